"""What the rest of the project knows of a frozen vision-language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch

from grip_env.tasks.base import Example

__all__ = ["Encoded", "FrozenVLM", "Scores"]


@dataclass
class Encoded:
    """A batch of examples after the vision encoder: all that is needed to score any selection of visual tokens.

    Rows are padded to the longest; padding is False in the masks and zero elsewhere.
    """

    examples: list[Example]
    tokens: torch.Tensor
    """Visual tokens as the language model gets them, float (B, N, D)."""
    token_mask: torch.Tensor
    """Which rows of ``tokens`` are real, bool (B, N)."""
    positions: torch.Tensor
    """Row and column of each token's centre in the image, float in [0, 1], (B, N, 2)."""
    question: torch.Tensor
    """The language model's input embeddings of the question, float (B, Q, D)."""
    question_mask: torch.Tensor
    """Which rows of ``question`` are real, bool (B, Q)."""
    input_ids: torch.Tensor
    """Prompt with all image placeholders, then the answer; right-padded, long (B, L)."""
    lengths: torch.Tensor
    """Number of ids of prompt and answer together, long (B,)."""
    answer_lengths: torch.Tensor
    """How many of those are the answer, long (B,)."""
    position_ids: torch.Tensor | None = None
    """Position id of each id in the full sequence: long (B, L), or (B, L, axes) where positions have several axes."""
    deepstack: torch.Tensor | None = None
    """What is added to the visual tokens after each of the language model's first E layers, float (B, N, E, D)."""
    cells: torch.Tensor | None = None
    """Height and width of what each token shows, as shares of the image, (B, N, 2); ``None`` where all show as much."""

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, rows: slice | Sequence[int] | torch.Tensor) -> Encoded:
        """Return the chosen rows as a new batch (padding is kept)."""
        index = torch.arange(len(self))[rows] if isinstance(rows, slice) else torch.as_tensor(rows, dtype=torch.long)
        parts: dict[str, Any] = {
            name: value[index] for name, value in vars(self).items() if isinstance(value, torch.Tensor | Encoded)
        }
        return replace(self, examples=[self.examples[row] for row in index.tolist()], **parts)

    @staticmethod
    def concatenate(parts: Sequence[Encoded]) -> Encoded:
        """Join batches, padding each tensor to the longest."""
        padded: dict[str, Any] = {}
        for name, first in vars(parts[0]).items():
            values: list[Any] = [getattr(part, name) for part in parts]
            if isinstance(first, Encoded):  # a batch within the batch, as of blocks of tokens
                padded[name] = Encoded.concatenate(values)
            if not isinstance(first, torch.Tensor):
                continue
            padded[name] = _padded_cat(values)
        return replace(parts[0], examples=[example for part in parts for example in part.examples], **padded)

    def full_selection(self) -> torch.Tensor:
        """Return the selection that keeps every real token, bool (B, 1, N)."""
        return self.token_mask[:, None].clone()

    def kept_fraction(self, selection: torch.Tensor) -> torch.Tensor:
        """Return the share of the real tokens that each selection, bool (B, G, N), keeps: float32 (B, G), in [0, 1]."""
        real = self.token_mask[:, None]
        return (selection & real).sum(-1) / real.sum(-1).clamp_min(1)

    def relevance(self) -> torch.Tensor | None:
        """Return the ground-truth relevance of each token, float (B, N), or ``None`` where any example has none."""
        rows = [
            example.token_relevance(place.cpu().numpy())
            for example, place in zip(self.examples, self.positions, strict=True)
        ]
        known = [torch.from_numpy(row) for row in rows if row is not None]
        return torch.stack(known).to(self.tokens.device) * self.token_mask if len(known) == len(rows) else None


def _padded_cat(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return tensors (b, L, ...) in one, with zeros where a row is shorter than the longest."""
    if values[0].dim() < 2 or len({value.shape[1] for value in values}) == 1:
        return torch.cat(list(values))
    return torch.nn.utils.rnn.pad_sequence([row for value in values for row in value], batch_first=True)


@dataclass(frozen=True)
class Scores:
    """How a frozen model answers under each selection.

    The last two fields are there only where :meth:`FrozenVLM.score` was asked for them.
    """

    log_likelihood: torch.Tensor
    """Mean over the answer's tokens of their log-probability, float (B, G)."""
    correct: torch.Tensor
    """Whether greedy decoding would begin with the answer, bool (B, G); whether it would end there is not looked at."""
    kept: torch.Tensor
    """Share of the real visual tokens that the model saw, float (B, G), in [0, 1]."""
    first_token: torch.Tensor | None = None
    """Log-probability of every token of the vocabulary as the first of the answer, float32 (B, G, V).

    Large: 0.6 MB for each selection where V is 150,000. Meant for the full image, where G is 1."""
    agreement: torch.Tensor | None = None
    """Negative KL divergence, in nats, from the distribution over the answer's first token with all tokens kept to the
    one under the selection, float32 (B, G): 0 where they are the same, below 0 elsewhere."""

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Scores:
        fields: dict[str, Any] = {name: value if value is None else change(value) for name, value in vars(self).items()}
        return Scores(**fields)

    def __getitem__(self, rows: slice | torch.Tensor) -> Scores:
        """Return the chosen examples' scores; a slice shares their memory, a tensor of indices copies them."""
        return self._each(lambda value: value[rows])

    def cpu(self) -> Scores:
        """Return the same in main memory, as float32 where they are no bools."""
        return self._each(lambda value: value.cpu() if value.dtype == torch.bool else value.float().cpu())

    @staticmethod
    def concatenate(parts: Sequence[Scores]) -> Scores:
        """Join the scores of several batches; a field that one of them lacks is left out."""
        fields: dict[str, Any] = {}
        for name in vars(parts[0]):
            values = [getattr(part, name) for part in parts]
            fields[name] = None if any(value is None for value in values) else torch.cat(values)
        return Scores(**fields)


@runtime_checkable
class FrozenVLM(Protocol):
    """A vision-language model whose weights never change."""

    @property
    def name(self) -> str:
        """Name for logs."""
        ...

    @property
    def width(self) -> int:
        """Width D of the visual tokens and question embeddings."""
        ...

    def encode(self, examples: Sequence[Example]) -> Encoded:
        """Run the vision encoder once per example."""
        ...

    def score(
        self,
        encoded: Encoded,
        selection: torch.Tensor,
        first_token: bool = False,
        reference: torch.Tensor | None = None,
    ) -> Scores:
        """Score G selections of each example.

        Where ``reference`` is given, each selection's distribution over the first answer token is compared with it at
        once and dropped, so that (B, G, V) numbers are never held together: beyond the scores themselves, this takes
        the memory of a few times (R, V) float32 numbers, with R the selections that run through the model at a time.

        Args:
            encoded: The examples.
            selection: bool (B, G, N), True for tokens the language model may see.
            first_token: Fill in ``first_token`` of the scores, float32 (B, G, V).
            reference: ``first_token`` of the same examples' scores with every token kept, (B, 1, V); fills in
                ``agreement`` of the scores. ``None`` leaves it out.
        """
        ...

    def log_likelihood(
        self, encoded: Encoded, selection: torch.Tensor, tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the mean answer log-likelihood under each selection, (B, G).

        Args:
            encoded: The examples.
            selection: bool (B, G, N).
            tokens: Stand-ins for ``encoded.tokens``, float (B, N, D); gradients flow to them when they need any.
        """
        ...

    def generate(self, encoded: Encoded, selection: torch.Tensor, max_new_tokens: int = 16) -> list[list[str]]:
        """Answer greedily under each selection (B, G, N): B lists of G texts."""
        ...

    def attention(self, encoded: Encoded, kind: str = "cls") -> torch.Tensor:
        """Return an attention score for each visual token, float (B, N); NotImplementedError where a model has none."""
        ...
