"""Interface of a frozen vision-language model, with its encoded examples and scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch

from grip_env.tasks.base import Example

__all__ = ["Encoded", "FrozenVLM", "Scores"]


@dataclass
class Encoded:
    """A batch of examples after the vision encoder.

    It holds everything needed to score any selection of visual tokens. Rows are padded to the longest; padding is False
    in the masks and zero elsewhere.
    """

    examples: list[Example]
    tokens: torch.Tensor
    """Visual tokens as the language model gets them, float (B, N, D)."""
    token_mask: torch.Tensor
    """Mask of ``tokens``, bool (B, N): True for real tokens, False for padding."""
    positions: torch.Tensor
    """Row and column of each token's centre in the image, float in [0, 1], (B, N, 2)."""
    question: torch.Tensor
    """The language model's input embeddings of the question, float (B, Q, D)."""
    question_mask: torch.Tensor
    """Mask of ``question``, bool (B, Q): True for real tokens, False for padding."""
    input_ids: torch.Tensor
    """Prompt with all image placeholders, then the answer; right-padded, long (B, L)."""
    lengths: torch.Tensor
    """Number of ids of prompt and answer together, long (B,)."""
    answer_lengths: torch.Tensor
    """Number of ids that belong to the answer, long (B,)."""
    position_ids: torch.Tensor | None = None
    """Position id of each id in the full sequence: long (B, L), or (B, L, axes) where positions have several axes."""
    deepstack: torch.Tensor | None = None
    """Features added to the visual tokens after each of the language model's first E layers, float (B, N, E, D)."""
    cells: torch.Tensor | None = None
    """Height and width of the region each token shows, as shares of the image, (B, N, 2); ``None`` if all are equal."""

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

    def widths(self) -> dict[str, int]:
        """Return the length to which each tensor (B, L, ...) is padded, by its name."""
        named = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return {name: value.shape[1] for name, value in named.items() if value.dim() > 1}

    def widened(self, widths: Mapping[str, int]) -> Encoded:
        """Return the same batch, padded with zeros to given lengths; see :meth:`widths`."""
        padded: dict[str, Any] = {}
        for name, width in widths.items():
            value = getattr(self, name)
            more = value.new_zeros(len(value), width - value.shape[1], *value.shape[2:])
            padded[name] = torch.cat([value, more], 1) if more.shape[1] else value
        return replace(self, **padded)

    def full_selection(self) -> torch.Tensor:
        """Return the selection that keeps every real token, bool (B, 1, N)."""
        return self.token_mask[:, None].clone()

    def kept_fraction(self, selection: torch.Tensor) -> torch.Tensor:
        """Return the share of real tokens kept by each selection, bool (B, G, N).

        The result is float32 (B, G), in [0, 1].
        """
        real = self.token_mask[:, None]
        return (selection & real).sum(-1) / real.sum(-1).clamp_min(1)

    def relevance(self) -> torch.Tensor | None:
        """Return the ground-truth relevance of each token, float (B, N).

        It is ``None`` if any example has no relevance.
        """
        rows = [
            example.token_relevance(place.cpu().numpy())
            for example, place in zip(self.examples, self.positions, strict=True)
        ]
        known = [torch.from_numpy(row) for row in rows if row is not None]
        return torch.stack(known).to(self.tokens.device) * self.token_mask if len(known) == len(rows) else None


def _padded_cat(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate tensors (b, L, ...), with rows zero-padded to the longest."""
    if values[0].dim() < 2 or len({value.shape[1] for value in values}) == 1:
        return torch.cat(list(values))
    return torch.nn.utils.rnn.pad_sequence([row for value in values for row in value], batch_first=True)


@dataclass(frozen=True)
class Scores:
    """Scores of a frozen model's answers under each selection.

    The last two fields are filled in only if :meth:`FrozenVLM.score` is asked for them.
    """

    log_likelihood: torch.Tensor
    """Mean log-probability of the answer's tokens, float (B, G)."""
    correct: torch.Tensor
    """True where greedy decoding begins with the answer, whether or not it ends there, bool (B, G)."""
    kept: torch.Tensor
    """Share of the real visual tokens that the model saw, float (B, G), in [0, 1]."""
    first_token: torch.Tensor | None = None
    """Log-probability of each token of the vocabulary as the answer's first token, float32 (B, G, V).

    It is large: 0.6 MB per selection for V = 150,000. It is meant for the full image, where G is 1."""
    agreement: torch.Tensor | None = None
    """Negative KL divergence, in nats, from the distribution over the answer's first token with all tokens kept to the
    one under the selection, float32 (B, G): 0 where they are equal, below 0 elsewhere."""

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Scores:
        fields: dict[str, Any] = {name: value if value is None else change(value) for name, value in vars(self).items()}
        return Scores(**fields)

    def __getitem__(self, rows: slice | torch.Tensor) -> Scores:
        """Return the scores of the chosen examples.

        A slice shares memory with the original, a tensor of indices copies.
        """
        return self._each(lambda value: value[rows])

    def cpu(self) -> Scores:
        """Return the scores in main memory, with all fields but bools as float32."""
        return self._each(lambda value: value.cpu() if value.dtype == torch.bool else value.float().cpu())

    @staticmethod
    def concatenate(parts: Sequence[Scores]) -> Scores:
        """Join the scores of several batches; a field missing from one of them is left out."""
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

        If ``reference`` is given, each selection's distribution over the first answer token is compared with it
        immediately and discarded, so (B, G, V) numbers are never held in memory. Beyond the scores themselves, this
        takes a few times (R, V) float32 numbers, where R is the number of selections in one call of the model.

        Args:
            encoded: The examples.
            selection: bool (B, G, N), True for tokens the language model may see.
            first_token: If True, fill in ``first_token`` of the scores, float32 (B, G, V).
            reference: ``first_token`` of the same examples' scores with every token kept, (B, 1, V). If given,
                ``agreement`` of the scores is filled in.
        """
        ...

    def log_likelihood(
        self, encoded: Encoded, selection: torch.Tensor, tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the mean answer log-likelihood under each selection, (B, G).

        Args:
            encoded: The examples.
            selection: bool (B, G, N).
            tokens: Replacement for ``encoded.tokens``, float (B, N, D); gradients flow to it if it requires any.
        """
        ...

    def generate(self, encoded: Encoded, selection: torch.Tensor, max_new_tokens: int = 16) -> list[list[str]]:
        """Answer greedily under each selection (B, G, N): B lists of G texts."""
        ...

    def attention(self, encoded: Encoded, kind: str = "cls") -> torch.Tensor:
        """Return an attention score for each visual token, float (B, N).

        Raises:
            NotImplementedError: If the model has none.
        """
        ...
