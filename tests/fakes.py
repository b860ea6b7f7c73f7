"""A frozen model and tasks that cost nothing, for tests of everything around a real one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from grip_env.tasks.base import Example
from grip_env.vlms.base import Encoded, Scores
from grip_env.vlms.likelihood import negative_divergence

WIDTH = 8
VOCABULARY = 5


class FakeVLM:
    """Answers by the share of relevant tokens it sees: log-likelihood -2 with none, -0.1 with all.

    Every other token kept costs a little, so that selections of one size differ and are easy to score
    by hand (see :func:`expected_log_likelihood`). Tokens are the mean colours of the cells of a grid.

    Args:
        side: Cells along each side of the grid; N = side * side.
        count: How many of the N tokens an example has, for models with dynamic resolution; all by default.
    """

    name = "fake"
    width = WIDTH

    def __init__(self, side: int = 4, count: Callable[[Example], int] | None = None) -> None:
        self.side = side
        self.count = count
        self.encode_calls: list[int] = []
        self.score_calls: list[tuple[int, ...]] = []

    def encode(self, examples: Sequence[Example]) -> Encoded:
        self.encode_calls.append(len(examples))
        counts = [self.count(example) if self.count else self.side**2 for example in examples]
        longest, words = max(counts), [example.question.split() for example in examples]
        batch, question = len(examples), max(len(row) for row in words)
        encoded = Encoded(
            examples=list(examples),
            tokens=torch.zeros(batch, longest, WIDTH),
            token_mask=torch.zeros(batch, longest, dtype=torch.bool),
            positions=torch.zeros(batch, longest, 2),
            question=torch.zeros(batch, question, WIDTH),
            question_mask=torch.zeros(batch, question, dtype=torch.bool),
            input_ids=torch.zeros(batch, longest + question + 1, dtype=torch.long),
            lengths=torch.tensor([n + len(row) + 1 for n, row in zip(counts, words, strict=True)]),
            answer_lengths=torch.ones(batch, dtype=torch.long),
        )
        centres = (torch.arange(self.side) + 0.5) / self.side
        places = torch.cartesian_prod(centres, centres)
        for row, example in enumerate(examples):
            n = counts[row]
            encoded.token_mask[row, :n] = True
            encoded.positions[row, :n] = places[:n]
            encoded.tokens[row, :n, :3] = self._colours(example.image)[:n]
            encoded.tokens[row, :n, 3:5] = places[:n]
            for at, word in enumerate(words[row]):
                encoded.question[row, at] = _embedding(word)
                encoded.question_mask[row, at] = True
        return encoded

    def _colours(self, image: np.ndarray) -> torch.Tensor:
        height, width = image.shape[0] // self.side, image.shape[1] // self.side
        cells = image[: height * self.side, : width * self.side].reshape(self.side, height, self.side, width, 3)
        return torch.from_numpy(cells.mean((1, 3), dtype=np.float64).reshape(-1, 3) / 255).float()

    def score(
        self,
        encoded: Encoded,
        selection: torch.Tensor,
        first_token: bool = False,
        reference: torch.Tensor | None = None,
    ) -> Scores:
        self.score_calls.append(tuple(selection.shape))
        assert selection.dtype == torch.bool
        assert selection.shape[::2] == encoded.token_mask.shape
        assert not (selection & ~encoded.token_mask[:, None]).any(), "padding was kept"
        likelihood = self.log_likelihood(encoded, selection)
        start = expected_first_token(selection)
        return Scores(
            log_likelihood=likelihood,
            correct=likelihood > -1.0,
            kept=selection.sum(-1) / encoded.token_mask.sum(-1, keepdim=True),
            first_token=start if first_token else None,
            agreement=None if reference is None else negative_divergence(reference, start),
        )

    def log_likelihood(
        self, encoded: Encoded, selection: torch.Tensor, tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        rows = []
        for place, mask, example in zip(encoded.positions, encoded.token_mask, encoded.examples, strict=True):
            grades = example.token_relevance(place.numpy())
            known = np.ones(len(place)) if grades is None else grades > 0
            rows.append(torch.from_numpy(known).bool() & mask)
        relevant = torch.stack(rows)[:, None]  # (B, 1, N)
        share = (selection & relevant).sum(-1) / relevant.sum(-1).clamp_min(1)
        return -2.0 + 1.9 * share - 0.001 * (selection & ~relevant).sum(-1)

    def generate(self, encoded: Encoded, selection: torch.Tensor, max_new_tokens: int = 16) -> list[list[str]]:
        right = self.score(encoded, selection).correct.tolist()
        return [
            [example.answer if good else "?" for good in row]
            for example, row in zip(encoded.examples, right, strict=True)
        ]

    def attention(self, encoded: Encoded, kind: str = "cls") -> torch.Tensor:
        return encoded.tokens.sum(-1) * encoded.token_mask


INFO_KEYS = {
    "index",
    "k",
    "kept",
    "kept_count",
    "relevant",
    "relevant_count",
    "relevance_known",
    "full_log_likelihood",
    "scored",
    "log_likelihood",
    "correct",
}
"""What every info of every environment has."""


def indices(mask: np.ndarray) -> Any:
    """Return where a mask of an info is True, for masks (B, N) one list for each row."""
    assert mask.dtype == bool
    return np.flatnonzero(mask).tolist() if mask.ndim == 1 else [indices(row) for row in mask]


def expected_log_likelihood(kept: Sequence[int], relevant: Sequence[int]) -> float:
    """Say independently what :class:`FakeVLM` answers."""
    inside = len(set(kept) & set(relevant))
    return -2.0 + 1.9 * inside / max(1, len(relevant)) - 0.001 * (len(kept) - inside)


def expected_first_token(selection: torch.Tensor) -> torch.Tensor:
    """Say which first token :class:`FakeVLM` answers with: log-probabilities (..., VOCABULARY).

    Every token kept speaks for some words and against others, whatever the picture shows.
    """
    places = torch.arange(1, selection.shape[-1] + 1)[:, None] * torch.arange(1, VOCABULARY + 1)
    return (selection.float() @ places.float().sin()).log_softmax(-1)


def _embedding(word: str) -> torch.Tensor:
    digest = hashlib.blake2b(word.encode(), digest_size=WIDTH).digest()
    return torch.tensor([byte / 255 for byte in digest])


class FakeTask:
    """Twelve-pixel pictures with one coloured cell of a 4 x 4 grid and a question about it.

    Args:
        size: Examples in each split.
        relevance: Whether the truth is known.
    """

    name = "fake"
    splits = ("train", "test")

    def __init__(self, size: int = 10, relevance: bool = True) -> None:
        self._size = size
        self.relevance = relevance

    def size(self, split: str) -> int:
        return self._size

    def example(self, split: str, index: int) -> Example:
        row, column = divmod((5 * index + len(split)) % 16, 4)
        image = np.full((12, 12, 3), 40, dtype=np.uint8)
        image[3 * row : 3 * row + 3, 3 * column : 3 * column + 3] = (200, 20 * (index % 10), 90)
        relevance = np.zeros((4, 4), dtype=np.float32)
        relevance[row, column] = 1.0
        relevance[row, (column + 1) % 4] = 0.5
        if index % 3 == 0:
            relevance[(row + 1) % 4, column] = 0.75
        return Example(
            image=image,
            question=f"what is number {index} of {split}?",
            answer="red",
            family=("color", "shape")[index % 2],
            relevance=relevance if self.relevance else None,
            key=f"fake/{split}/{index}",
        )
