"""Batches of random tokens, for tests of what chooses among them."""

from __future__ import annotations

import torch

from grip_env.tasks.base import Example
from grip_env.vlms.base import Encoded
from tests.fakes import WIDTH, FakeTask, FakeVLM


class AttentiveVLM(FakeVLM):
    """Attends to tokens as their first two numbers say; padding gets more than any token."""

    def attention(self, encoded: Encoded, kind: str = "cls") -> torch.Tensor:
        column = {"cls": 0, "received": 1}[kind]
        return encoded.tokens[..., column].masked_fill(~encoded.token_mask, 1e6)


def random_batch(seed: int, batch: int, tokens: int, words: int = 3, ties: bool = False) -> Encoded:
    """Return examples with random tokens and questions, and padding anywhere among them.

    Args:
        seed: Of all of it.
        batch: Examples, B.
        tokens: Tokens of each, padding included, N.
        words: Words of each question, padding included, Q.
        ties: Take every number from {-1, 0, 1}, so that many tokens and scores are equal.
    """
    source = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> torch.Tensor:
        if ties:
            return torch.randint(-1, 2, shape, generator=source).float()
        return torch.randn(shape, generator=source)

    def mask(*shape: int) -> torch.Tensor:
        found = torch.rand(shape, generator=source) < 0.7
        found[torch.arange(shape[0]), torch.randint(shape[1], (shape[0],), generator=source)] = True
        return found

    examples: list[Example] = [FakeTask().example("train", row % 10) for row in range(batch)]
    token_mask, question_mask = mask(batch, tokens), mask(batch, words)
    return Encoded(
        examples=examples,
        tokens=numbers(batch, tokens, WIDTH) * token_mask[..., None],
        token_mask=token_mask,
        positions=torch.rand(batch, tokens, 2, generator=source) * token_mask[..., None],
        question=numbers(batch, words, WIDTH) * question_mask[..., None],
        question_mask=question_mask,
        input_ids=torch.zeros(batch, tokens + words + 1, dtype=torch.long),
        lengths=token_mask.sum(1) + question_mask.sum(1) + 1,
        answer_lengths=torch.ones(batch, dtype=torch.long),
    )


def random_counts(encoded: Encoded, seed: int) -> torch.Tensor:
    """Return a count from 1 to all for each example, long (B,)."""
    share = torch.rand(len(encoded), generator=torch.Generator().manual_seed(seed))
    return (share * encoded.token_mask.sum(1)).long() + 1


def encode(count: int = 5, padded: bool = False) -> Encoded:
    """Return examples of :class:`FakeTask` with random tokens at their places; rows of 16, 14, ... if ``padded``."""
    task = FakeTask()
    examples = [task.example("train", index) for index in range(count)]
    sizes = {example.key: 16 - 2 * index for index, example in enumerate(examples)}
    encoded = FakeVLM(count=(lambda example: sizes[example.key]) if padded else None).encode(examples)
    noise = torch.randn(encoded.tokens.shape, generator=torch.Generator().manual_seed(7))
    encoded.tokens = noise * encoded.token_mask[..., None]
    return encoded
