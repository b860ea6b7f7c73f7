"""Frozen model with blocks of visual tokens, few enough to score every selection."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from grip_env.tasks.base import Example
from grip_env.vlms.base import Encoded, FrozenVLM, Scores

__all__ = ["BlockEncoded", "BlockVLM", "check_grid"]


def check_grid(rows: int, columns: int) -> int:
    """Return the number of blocks in a grid.

    Raises:
        ValueError: If there are no blocks.
    """
    if rows < 1 or columns < 1:
        raise ValueError(f"a grid of blocks has at least one row and one column; got {rows} x {columns}")
    return rows * columns


@dataclass(kw_only=True)
class BlockEncoded(Encoded):
    """A batch of examples cut into M = rows * columns blocks of visual tokens.

    ``tokens`` (B, M, D) are the means of the blocks, ``positions`` (B, M, 2) their centres. ``token_mask`` (B, M) is
    True for blocks with any token; the other blocks are zero. The relevance grid of ``examples`` is that of the blocks,
    too: a block is as relevant as its most relevant token. Everything else is as in ``whole``.
    """

    whole: Encoded
    """The same examples with the N visual tokens of the wrapped model."""
    block: torch.Tensor
    """Block of each visual token, long (B, N); 0 for padding, which is in no block."""

    def expand(self, selection: torch.Tensor) -> torch.Tensor:
        """Return the tokens in the chosen blocks, bool (B, G, N).

        Args:
            selection: bool (B, G, M).

        Raises:
            ValueError: If it has the wrong shape or dtype.
        """
        batch, blocks = self.token_mask.shape
        if selection.dtype != torch.bool or selection.dim() != 3 or selection.shape[::2] != (batch, blocks):
            raise ValueError(
                f"selection must be bool of shape ({batch}, G, {blocks}); got {selection.dtype} of shape "
                f"{tuple(selection.shape)}: give one bool mask over the blocks for each of the G selections"
            )
        index = self.block[:, None].expand(-1, selection.shape[1], -1)  # (B, G, N)
        return selection.gather(2, index) & self.whole.token_mask[:, None]

    def pool(self, values: torch.Tensor) -> torch.Tensor:
        """Return the mean over each block's tokens, (B, M, ...); 0 for blocks without any.

        Args:
            values: Values of each token, (B, N, ...).
        """
        batch, blocks = self.token_mask.shape
        index = self.block.masked_fill(~self.whole.token_mask, blocks)  # an extra block for padding
        index = index.reshape(*index.shape, *[1] * (values.dim() - 2)).expand_as(values)
        sums = values.new_zeros(batch, blocks + 1, *values.shape[2:])
        return sums.scatter_reduce(1, index, values, "mean", include_self=False)[:, :-1]


class BlockVLM:
    """Wrapper of a frozen model that keeps or drops whole blocks of visual tokens.

    The image is cut into ``rows`` x ``columns`` equal blocks, and a token belongs to the block that contains its
    position. Keeping a block passes all its tokens unchanged to the language model: nothing is retrained or averaged,
    and scores are those of the wrapped model for these tokens. Blocks without tokens (of images that a model sees only
    in part) are padding. The wrapper can be used wherever a frozen model can: in environments, heuristics, reports and
    training.

    Args:
        vlm: The frozen model to wrap.
        rows: Number of rows of blocks.
        columns: Number of columns of blocks; block ``r * columns + c`` is in row r and column c.

    Raises:
        ValueError: If there would be no block.

    The embedded model's 12 x 12 tokens make 4 x 4 blocks of 3 x 3, or 4 x 6 of 3 x 2.
    """

    def __init__(self, vlm: FrozenVLM, rows: int = 4, columns: int = 4) -> None:
        check_grid(rows, columns)
        self.vlm = vlm
        self.rows = rows
        self.columns = columns

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockVLM:
        """Return the model itself, uncopied.

        It never changes, and Gymnasium copies the arguments of environments.
        """
        return self

    @property
    def name(self) -> str:
        """Name for logs."""
        return f"{self.vlm.name} in {self.rows} x {self.columns} blocks"

    @property
    def width(self) -> int:
        """Width D of the blocks and question embeddings."""
        return self.vlm.width

    def fingerprint(self) -> str:
        """Return a digest of everything but the examples that scores depend on.

        Raises:
            NotImplementedError: If the wrapped model has none.
        """
        inside = getattr(self.vlm, "fingerprint", None)
        if inside is None:
            raise NotImplementedError(f"{self.vlm.name} has no fingerprint() that tells it from other models")
        return hashlib.sha256(f"{inside()} {self.rows} x {self.columns}".encode()).hexdigest()

    def encode(self, examples: Sequence[Example]) -> BlockEncoded:
        """Run the vision encoder once per example; see :class:`BlockEncoded`."""
        whole = self.vlm.encode(examples)
        size = torch.tensor([self.rows, self.columns], device=whole.positions.device)
        cell = (whole.positions * size).long().clamp_min(0).minimum(size - 1)  # a position of 1 is in the last row
        block = (cell[..., 0] * self.columns + cell[..., 1]) * whole.token_mask
        count = self.rows * self.columns
        held = torch.nn.functional.one_hot(block, count).bool() & whole.token_mask[..., None]  # (B, N, M)
        centres = torch.cartesian_prod(*((torch.arange(n) + 0.5) / n for n in (self.rows, self.columns)))  # (M, 2)
        mask = held.any(1)
        encoded = BlockEncoded(
            examples=[self._in_blocks(*row) for row in zip(whole.examples, whole.positions, held, strict=True)],
            tokens=whole.tokens,
            token_mask=mask,
            positions=centres.to(whole.positions) * mask[..., None],
            question=whole.question,
            question_mask=whole.question_mask,
            input_ids=whole.input_ids,
            lengths=whole.lengths,
            answer_lengths=whole.answer_lengths,
            whole=whole,
            block=block,
        )
        encoded.tokens = encoded.pool(whole.tokens)
        return encoded

    def _in_blocks(self, example: Example, positions: torch.Tensor, held: torch.Tensor) -> Example:
        """Return the example with the relevance of its blocks."""
        grades = example.token_relevance(positions.cpu().numpy())
        if grades is None:
            return example
        highest = np.where(held.cpu().numpy(), grades[:, None], 0).max(0)  # (M,)
        return dataclasses.replace(example, relevance=highest.reshape(self.rows, self.columns).astype(np.float32))

    def score(
        self,
        encoded: Encoded,
        selection: torch.Tensor,
        first_token: bool = False,
        reference: torch.Tensor | None = None,
    ) -> Scores:
        """Score the tokens in the chosen blocks (B, G, M).

        See :class:`~grip_env.vlms.base.FrozenVLM`. ``kept`` is the share of tokens, not of blocks.
        """
        blocks = _blocks(encoded)
        return self.vlm.score(blocks.whole, blocks.expand(selection), first_token=first_token, reference=reference)

    def log_likelihood(
        self, encoded: Encoded, selection: torch.Tensor, tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the mean answer log-likelihood (B, G) under selections of blocks (B, G, M).

        Replacements for blocks, float (B, M, D), move all tokens of a block by their difference from its mean. So the
        mean itself changes nothing, and the gradient of a replacement is the sum of the gradients of its tokens.
        """
        blocks = _blocks(encoded)
        chosen = blocks.expand(selection)
        if tokens is None:
            return self.vlm.log_likelihood(blocks.whole, chosen)
        index = blocks.block[..., None].expand(-1, -1, tokens.shape[-1])  # (B, N, D)
        moved = blocks.whole.tokens + (tokens - blocks.tokens).gather(1, index)
        return self.vlm.log_likelihood(blocks.whole, chosen, moved)

    def generate(self, encoded: Encoded, selection: torch.Tensor, max_new_tokens: int = 16) -> list[list[str]]:
        """Answer greedily from the chosen blocks (B, G, M): B lists of G texts."""
        blocks = _blocks(encoded)
        return self.vlm.generate(blocks.whole, blocks.expand(selection), max_new_tokens)

    def attention(self, encoded: Encoded, kind: str = "cls") -> torch.Tensor:
        """Return the mean attention of each block's tokens, float (B, M)."""
        blocks = _blocks(encoded)
        return blocks.pool(self.vlm.attention(blocks.whole, kind))

    def tower_features(self, encoded: Encoded) -> torch.Tensor:
        """Return the mean of the vision tower's features of each block's tokens, float (B, M, W).

        Raises:
            NotImplementedError: If the wrapped model does not provide them for each visual token.
        """
        blocks = _blocks(encoded)
        inside = getattr(self.vlm, "tower_features", None)
        if inside is None:
            raise NotImplementedError(f"{self.vlm.name} gives no features before its projector")
        return blocks.pool(inside(blocks.whole))


def _blocks(encoded: Encoded) -> BlockEncoded:
    if not isinstance(encoded, BlockEncoded):
        raise TypeError(f"a BlockVLM scores what its own encode returns, a BlockEncoded; got {type(encoded).__name__}")
    return encoded
