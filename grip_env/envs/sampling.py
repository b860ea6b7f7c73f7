"""Which episodes come, and with what budget: a reproducible stream of (index, budget) pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

from grip_env.envs.checks import is_real

__all__ = ["Budget", "EpisodeStream", "Shares", "check_budget", "shuffled_indices", "tokens_in_budget"]

Budget: TypeAlias = "float | tuple[float, float] | list[float] | dict[str, float]"
"""A share of the tokens, a (low, high) range to draw from log-uniformly, or a list to draw from uniformly.

``{"low": low, "high": high}`` is another spelling of the range: JSON, as of an environment's spec, makes tuples lists.
"""

Shares: TypeAlias = "float | tuple[float, float] | list[float]"
"""A checked budget."""

_ROUNDS = 6
_BLOCK = 64
"""Indices that a stream draws at a time: one by one they would cost a hundred times as much each."""


def check_budget(budget: Budget) -> Shares:
    """Return ``budget`` with plain floats in it, a range as a tuple.

    Raises:
        ValueError: If a share is outside (0, 1], a list is empty, it is a text, or a range is not from low to high.

    >>> check_budget({"low": 0.03, "high": 0.5})
    (0.03, 0.5)
    """
    if isinstance(budget, Mapping):
        if set(budget) != {"low", "high"}:
            raise ValueError(f'a mapping as budget is a range {{"low": 0.03, "high": 0.5}}; got {dict(budget)!r}')
        budget = budget["low"], budget["high"]
        if all(map(is_real, budget)) and not budget[0] <= budget[1]:
            raise ValueError(f"a range of budgets goes from low to high; got low={budget[0]}, high={budget[1]}")
    if isinstance(budget, str | bytes):
        raise ValueError(f"a budget is a number, a (low, high) range or a list; got the text {budget!r}")
    given = list(budget) if isinstance(budget, Sequence) else [budget]
    if not all(map(is_real, given)):
        raise ValueError(f"a budget is a number, a (low, high) range or a list of numbers; got {budget!r}")
    shares = [float(share) for share in given]
    if not shares:
        raise ValueError("the list of budgets is empty: give at least one share of the tokens, such as [0.05, 0.1]")
    for share in shares:
        if not 0.0 < share <= 1.0:
            raise ValueError(f"a budget is a share of the visual tokens in (0, 1]; got {share:g}")
    if not isinstance(budget, tuple):
        return shares if isinstance(budget, Sequence) else shares[0]
    if len(shares) != 2 or shares[0] > shares[1]:
        raise ValueError(
            f"a tuple of budgets is a range (low, high), low first; got {budget!r}: pass a list for several budgets"
        )
    return shares[0], shares[1]


def tokens_in_budget(budget: float, count: int) -> int:
    """Return how many of ``count`` tokens a budget allows: max(1, round(budget * count)).

    >>> tokens_in_budget(0.1, 144), tokens_in_budget(0.001, 144)
    (14, 1)
    """
    return max(1, round(budget * count))


def shuffled_indices(key: int, start: int, count: int, size: int) -> np.ndarray:
    """Return elements ``start`` to ``start + count`` of an endless shuffle of ``range(size)``, int64 (count,).

    Every pass through the range is a new permutation. A keyed Feistel network permutes the smallest even-bit domain
    that holds the range, and values that fall outside are permuted again (cycle walking, fewer than four tries on
    average). So an element costs the same at any size, and a split of a million is never laid out.

    Args:
        key: Which shuffle, at least 0.
        start: The first element.
        count: How many.
        size: At most 2**62.

    >>> sorted(shuffled_indices(7, 0, 5, size=5).tolist())
    [0, 1, 2, 3, 4]
    """
    steps = np.arange(start, start + count, dtype=np.uint64)
    turn, value = steps // np.uint64(size), steps % np.uint64(size)
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    secret = _mixed(turn + _mixed(np.full(count, key, dtype=np.uint64)))
    outside = np.ones(count, dtype=bool)
    while outside.any():
        left, right, own = value[outside] >> half, value[outside] & low, secret[outside]
        for number in range(_ROUNDS):
            left, right = right, left ^ (_mixed(right + _mixed(own + np.uint64(number))) & low)
        value[outside] = left << half | right
        outside = value >= size
    return value.astype(np.int64)


def _mixed(bits: np.ndarray) -> np.ndarray:
    """Return each number hashed: a step of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), uint64 like ``bits``."""
    bits = bits + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


class EpisodeStream:
    """Endless (index, budget) pairs, fixed by the state of ``generator`` at creation and by nothing after it.

    The stream draws from a source of its own, so that what an agent does cannot change which episodes come.

    Args:
        generator: One number is drawn from it to seed the stream.
        size: How many examples there are; each pass visits every one once, in a new order.
        budget: As :func:`check_budget` returns it.
    """

    def __init__(self, generator: np.random.Generator, size: int, budget: Shares) -> None:
        self._key = int(generator.integers(2**63))
        self._budgets = np.random.default_rng(self._key)
        self._size = size
        self._budget = budget
        self._step = 0
        self._block: list[int] = []

    def next_index(self) -> int:
        """Return the next example's index."""
        place = self._step % _BLOCK
        if place == 0:
            self._block = shuffled_indices(self._key, self._step, _BLOCK, self._size).tolist()
        self._step += 1
        return self._block[place]

    def next_budget(self) -> float:
        """Return the next budget, a share in (0, 1]."""
        if isinstance(self._budget, tuple):
            low, high = self._budget
            return float(min(max(np.exp(self._budgets.uniform(np.log(low), np.log(high))), low), high))
        if isinstance(self._budget, list):
            return self._budget[int(self._budgets.integers(len(self._budget)))]
        return self._budget
