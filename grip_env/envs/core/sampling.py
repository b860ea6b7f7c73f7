"""Which episodes come, and with what budget: a reproducible stream of (index, budget) pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from grip_env.envs.core.checks import is_real, is_whole

__all__ = [
    "Budget",
    "EpisodeStream",
    "FixedEpisodes",
    "Shares",
    "check_budget",
    "check_examples",
    "draw_budget",
    "shuffled_indices",
    "tokens_in_budget",
]

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


def check_examples(examples: Any, size: int) -> tuple[int, ...] | range:
    """Return the indices that ``examples`` stands for: of the first so many, or those in a list.

    Raises:
        ValueError: If there are none, or not all of them are among the ``size`` of the split.

    >>> list(check_examples(3, size=10)), check_examples([4, 2], size=10)
    ([0, 1, 2], (4, 2))
    """
    if is_whole(examples):
        if not 1 <= examples <= size:
            raise ValueError(f"examples must be from 1 to {size}, as many as the split has; got {examples}")
        return range(int(examples))
    if isinstance(examples, np.ndarray) and examples.ndim == 1:
        examples = examples.tolist()
    if not isinstance(examples, Sequence) or not len(examples) or not all(map(is_whole, examples)):
        raise ValueError(f"examples must be how many, or a list of indices of the split; got {examples!r}")
    outside = [index for index in examples if not 0 <= index < size]
    if outside:
        raise ValueError(f"there is no example {outside[0]}: the split has {size}, 0 to {size - 1}")
    return tuple(map(int, examples))


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

    def next(self, index: int | None = None, budget: float | None = None) -> tuple[int, float]:
        """Return the next (index, budget); what is given is not drawn."""
        budget = self.next_budget() if budget is None else budget
        return self.next_index() if index is None else index, budget

    def next_index(self) -> int:
        """Return the next example's index."""
        place = self._step % _BLOCK
        if place == 0:
            self._block = shuffled_indices(self._key, self._step, _BLOCK, self._size).tolist()
        self._step += 1
        return self._block[place]

    def next_budget(self) -> float:
        """Return the next budget, a share in (0, 1]."""
        return draw_budget(self._budget, self._budgets)


class FixedEpisodes:
    """The same (index, budget) pairs in the same order, again and again: what an evaluation goes through.

    The budget of an example depends on its index alone, so that it is the same however the examples are shared out.

    Args:
        indices: Which examples, at least one.
        budget: As :func:`check_budget` returns it.
    """

    def __init__(self, indices: Sequence[int], budget: Shares) -> None:
        self._indices = indices
        self._budget = budget
        self._step = 0

    def next(self, index: int | None = None, budget: float | None = None) -> tuple[int, float]:
        """Return the next (index, budget); what is given is not taken from the list."""
        if index is None:
            index = self._indices[self._step % len(self._indices)]
            self._step += 1
        return index, draw_budget(self._budget, np.random.default_rng(index)) if budget is None else budget


def draw_budget(budget: Shares, generator: np.random.Generator) -> float:
    """Return a share of the tokens, drawn from ``generator`` where there is a choice."""
    if isinstance(budget, tuple):
        low, high = budget
        return float(min(max(np.exp(generator.uniform(np.log(low), np.log(high))), low), high))
    if isinstance(budget, list):
        return budget[int(generator.integers(len(budget)))]
    return budget
