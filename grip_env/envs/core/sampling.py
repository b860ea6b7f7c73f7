"""Reproducible streams of episodes, as (index, budget) pairs."""

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
"""Share of the tokens, (low, high) range to draw from log-uniformly, or list to draw from uniformly.

``{"low": low, "high": high}`` is another spelling of the range, for JSON (as in an environment's spec), which turns
tuples into lists.
"""

Shares: TypeAlias = "float | tuple[float, float] | list[float]"
"""Checked budget, as :func:`check_budget` returns it."""

_ROUNDS = 6
_BLOCK = 64
"""Number of indices that a stream draws at a time; drawn singly, each would cost a hundred times as much."""


def check_budget(budget: Budget) -> Shares:
    """Return a checked ``budget`` of plain floats, with a range as a tuple.

    Raises:
        ValueError: If a share is outside (0, 1], a list is empty, the budget is a string, or a range is not from low to
            high.

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
    """Return the indices that ``examples`` specifies, as a count of first examples or a list.

    Raises:
        ValueError: If there are none, or not all of them are in the split, which has ``size`` examples.

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
    """Return the number of tokens that a budget allows: max(1, round(budget * count)).

    >>> tokens_in_budget(0.1, 144), tokens_in_budget(0.001, 144)
    (14, 1)
    """
    return max(1, round(budget * count))


def shuffled_indices(key: int, start: int, count: int, size: int) -> np.ndarray:
    """Return ``count`` elements of an endless shuffle of ``range(size)``, from ``start`` on.

    Every pass through the range is a new permutation. A keyed Feistel network permutes the smallest even-bit domain
    that holds the range, and values that fall outside are permuted again (cycle walking, fewer than four tries on
    average). So an element costs the same at any size, and the permutation of a large split is never stored.

    Args:
        key: Number of the shuffle, at least 0.
        start: Position of the first element.
        count: Number of elements.
        size: Size of the range, at most 2**62.

    Returns:
        int64 (count,).

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
    """Hash each number, uint64, by a step of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    bits = bits + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


class EpisodeStream:
    """Endless stream of (index, budget) pairs.

    It depends only on the state of ``generator`` at creation. The stream then draws from its own generators, so the
    agent's actions cannot change which episodes come.

    Args:
        generator: One number is drawn from it to seed the stream.
        size: Number of examples; each pass visits every example once, in a new order.
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
        """Return the next (index, budget); given values are not drawn."""
        budget = self.next_budget() if budget is None else budget
        return self.next_index() if index is None else index, budget

    def next_index(self) -> int:
        """Return the index of the next example."""
        place = self._step % _BLOCK
        if place == 0:
            self._block = shuffled_indices(self._key, self._step, _BLOCK, self._size).tolist()
        self._step += 1
        return self._block[place]

    def next_budget(self) -> float:
        """Return the next budget, a share in (0, 1]."""
        return draw_budget(self._budget, self._budgets)


class FixedEpisodes:
    """Repeating sequence of the same (index, budget) pairs, for evaluation.

    The budget of an example depends on its index alone, so it is the same however the examples are distributed.

    Args:
        indices: Indices of the examples, at least one.
        budget: As :func:`check_budget` returns it.
    """

    def __init__(self, indices: Sequence[int], budget: Shares) -> None:
        self._indices = indices
        self._budget = budget
        self._step = 0

    def next(self, index: int | None = None, budget: float | None = None) -> tuple[int, float]:
        """Return the next (index, budget); given values replace those of the sequence."""
        if index is None:
            index = self._indices[self._step % len(self._indices)]
            self._step += 1
        return index, draw_budget(self._budget, np.random.default_rng(index)) if budget is None else budget


def draw_budget(budget: Shares, generator: np.random.Generator) -> float:
    """Return a share of the tokens, drawn from ``generator`` if the budget leaves a choice."""
    if isinstance(budget, tuple):
        low, high = budget
        return float(min(max(np.exp(generator.uniform(np.log(low), np.log(high))), low), high))
    if isinstance(budget, list):
        return budget[int(generator.integers(len(budget)))]
    return budget
