"""Which episodes come, and with what budget: a reproducible stream of (index, budget) pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

__all__ = ["Budget", "EpisodeStream", "check_budget", "shuffled_index", "tokens_in_budget"]

Budget: TypeAlias = "float | tuple[float, float] | list[float]"
"""A share of the tokens, a (low, high) range to draw from log-uniformly, or a list to draw from uniformly."""

_ROUNDS = 6


def check_budget(budget: Budget) -> Budget:
    """Return ``budget`` with plain floats in it.

    Raises:
        ValueError: If a share is outside (0, 1], a list is empty, it is a text, or a tuple is not a (low, high) range.
    """
    if isinstance(budget, str):
        raise ValueError(f"a budget is a number, a (low, high) range or a list; got the text {budget!r}")
    shares = [float(share) for share in budget] if isinstance(budget, Sequence) else [float(budget)]
    if not shares:
        raise ValueError("the list of budgets is empty: give at least one share of the tokens, such as [0.05, 0.1]")
    for share in shares:
        if not 0.0 < share <= 1.0:
            raise ValueError(f"a budget is a share of the visual tokens in (0, 1]; got {share:g}")
    if not isinstance(budget, tuple):
        return shares if isinstance(budget, Sequence) else shares[0]
    if len(shares) != 2 or shares[0] > shares[1]:
        raise ValueError(f"a tuple of budgets is a range (low, high); got {budget!r}: pass a list for several budgets")
    return shares[0], shares[1]


def tokens_in_budget(budget: float, count: int) -> int:
    """Return how many of ``count`` tokens a budget allows: max(1, round(budget * count)).

    >>> tokens_in_budget(0.1, 144), tokens_in_budget(0.001, 144)
    (14, 1)
    """
    return max(1, round(budget * count))


def shuffled_index(key: int, step: int, size: int) -> int:
    """Return element ``step`` of an endless shuffle of ``range(size)``: every pass is a new permutation.

    A keyed Feistel network permutes the smallest even-bit domain that holds the split, and values that fall
    outside are permuted again (cycle walking, fewer than four tries on average). So an element costs the same
    at any size, and a split of a million is never laid out.

    >>> sorted(shuffled_index(7, step, 5) for step in range(5))
    [0, 1, 2, 3, 4]
    """
    around, value = divmod(step, size)
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    secret = key.to_bytes(16, "little", signed=True) + around.to_bytes(8, "little")
    while True:
        left, right = value >> half, value & low
        for turn in range(_ROUNDS):
            message = turn.to_bytes(1, "little") + right.to_bytes(8, "little")
            digest = hashlib.blake2b(message, digest_size=8, key=secret).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & low)
        value = left << half | right
        if value < size:
            return value


class EpisodeStream:
    """Endless (index, budget) pairs, fixed by the state of ``generator`` at creation and by nothing after it.

    The stream draws from a source of its own, so that what an agent does cannot change which episodes come.

    Args:
        generator: One number is drawn from it to seed the stream.
        size: How many examples there are; each pass visits every one once, in a new order.
        budget: As :func:`check_budget` returns it.
    """

    def __init__(self, generator: np.random.Generator, size: int, budget: Budget) -> None:
        self._key = int(generator.integers(2**63))
        self._budgets = np.random.default_rng(self._key)
        self._size = size
        self._budget = budget
        self._step = 0

    def next_index(self) -> int:
        """Return the next example's index."""
        index = shuffled_index(self._key, self._step, self._size)
        self._step += 1
        return index

    def next_budget(self) -> float:
        """Return the next budget, a share in (0, 1]."""
        if isinstance(self._budget, tuple):
            low, high = self._budget
            return float(min(max(np.exp(self._budgets.uniform(np.log(low), np.log(high))), low), high))
        if isinstance(self._budget, list):
            return self._budget[int(self._budgets.integers(len(self._budget)))]
        return self._budget
