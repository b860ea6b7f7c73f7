"""How rugged the reward of a selection is: local optima under swaps, and how far tokens are from adding up.

Everything here is exact, over tables of every selection (:class:`~grip_env.exact.reward_table.RewardTable`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, permutations
from typing import Any

import numpy as np

from grip_env.exact.reward_table import RewardTable

__all__ = [
    "ROUNDING",
    "Curvature",
    "Standing",
    "Terrain",
    "best_swaps",
    "climb",
    "curvature",
    "explore",
    "greedy",
]

ROUNDING = 1e-4
"""What a frozen model's scores may differ by for no reason, in nats: second differences up to it count as none, and
selections this close to the optimum as optimal."""


# -- swaps -----------------------------------------------------------------------------------------------------


def best_swaps(table: RewardTable) -> np.ndarray:
    """Return the row of the best selection one swap away (one token out, another in), int64 (S,).

    Where no swap gives a strictly larger reward, that is the selection's own row: it is a local optimum. Of several
    best swaps it is the first row.
    """
    masks, rewards = table.masks, table.rewards
    best, value = np.arange(len(masks)), rewards.copy()
    bits = [bit for bit in np.uint64(1) << np.arange(64, dtype=np.uint64) if (masks & bit).any()]
    for out, into in permutations(bits, 2):
        rows = np.flatnonzero((masks & (out | into)) == out)
        there = table.find(masks[rows] ^ (out | into))
        reward = rewards[there]
        tie = (reward == value[rows]) & (best[rows] != rows) & (there < best[rows])
        better = (reward > value[rows]) | tie
        best[rows[better]], value[rows[better]] = there[better], reward[better]
    return best


def climb(table: RewardTable) -> np.ndarray:
    """Return the row where best-improvement swap ascent ends when it starts in each row, int64 (S,).

    The local optima are the rows that occur in it, and how often each occurs is the size of its basin.
    """
    ends = best_swaps(table)
    while not np.array_equal(ends, ends[ends]):
        ends = ends[ends]  # each round doubles the number of swaps taken
    return ends


# -- differences -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curvature:
    """First and second differences of a reward f over all selections S of at most K tokens.

    The first differences are f(S + x) - f(S), for every S with |S| < K and every x outside it; the second ones
    f(S + x + y) - f(S + x) - f(S + y) + f(S), for every S with |S| < K - 1 and all pairs x, y outside it.

    f is submodular up to K, that is f(A + x) - f(A) >= f(B + x) - f(B) for all A within B with |B| < K, if and only
    if no second difference is positive: the condition for B = A + y, and those for larger B are sums of it.
    """

    violations: float
    """Share of second differences above ROUNDING: those that violate submodularity."""
    violation_size: float
    """Mean of these, 0 if there are none."""
    interaction: float
    """Mean size of the second differences divided by that of the first: 0 if rewards of tokens add up."""
    decreasing: float
    """Share of first differences below -ROUNDING: a token more, and the reward is smaller."""


def curvature(tables: Sequence[RewardTable]) -> Curvature:
    """Return what differences tell of tables of 0, 1, ..., K tokens of one instance.

    Raises:
        ValueError: If they are not that, or K is below 2.
    """
    sizes = [table.k for table in tables]
    if len(tables) < 3 or sizes != list(range(len(tables))):
        raise ValueError(f"curvature needs tables of 0, 1, ..., K tokens with K at least 2; got {sizes}")
    size = np.repeat(sizes, [len(table) for table in tables])
    masks = np.concatenate([table.masks for table in tables])
    order = np.argsort(masks)
    size, masks, value = size[order], masks[order], np.concatenate([table.rewards for table in tables])[order]

    def reward(sets: np.ndarray) -> np.ndarray:
        return value[np.searchsorted(masks, sets)]

    first, second = [], []
    largest, singles = sizes[-1], tables[1].masks
    for x in singles:
        inside = (masks & x == 0) & (size < largest)
        first.append(reward(masks[inside] | x) - value[inside])
    for x, y in combinations(singles, 2):
        inside = (masks & (x | y) == 0) & (size < largest - 1)
        sets = masks[inside]
        second.append(reward(sets | x | y) - reward(sets | x) - reward(sets | y) + value[inside])
    steps, bends = np.concatenate(first), np.concatenate(second)
    above = bends[bends > ROUNDING]
    step = float(np.abs(steps).mean())
    return Curvature(
        violations=len(above) / len(bends),
        violation_size=float(above.mean()) if len(above) else 0.0,
        interaction=float(np.abs(bends).mean()) / step if step else 0.0,
        decreasing=float((steps < -ROUNDING).mean()),
    )


def greedy(tables: Sequence[RewardTable]) -> np.ndarray:
    """Return what greedy forward selection ends with, bool (N,): the best token is added until K are chosen.

    Args:
        tables: Of 0, 1, ..., K tokens of one instance.
    """
    chosen = tables[0].masks[0]
    for table in tables[1:]:
        candidates = np.sort(tables[1].masks[(tables[1].masks & chosen) == 0] | chosen)
        chosen = candidates[table.rewards[table.find(candidates)].argmax()]
    return tables[-1].selection(int(tables[-1].find(np.array([chosen]))[0]))


# -- one instance ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Standing:
    """Where a method's selections of an instance stand, each a mean over its random choices."""

    gap: float
    """By how much their reward is below the optimum."""
    percentile: float
    """Share of all selections that are worse, plus half of the equals."""
    optimal: float
    """Share that are optimal: no more than ROUNDING below the optimum."""


@dataclass(frozen=True)
class Terrain:
    """The landscape of one instance at one k."""

    index: int
    family: str
    k: int
    optimal_reward: float
    spread: float
    """Standard deviation of the reward over all selections."""
    local_optima: int
    """Selections than which none is better one swap away, the global optimum among them."""
    worst_optimum: float
    """By how much the reward of the worst of these is below the optimum."""
    curvature: Curvature
    """Over all selections of at most k blocks."""
    methods: dict[str, Standing]
    rewards: np.ndarray = field(repr=False)
    """Of all selections, ascending, float64 (S,)."""

    def plain(self) -> dict[str, Any]:
        """Return what goes into the JSON file."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "rewards"}


def explore(
    tables: Sequence[RewardTable], index: int, family: str, selections: Mapping[str, np.ndarray] | None = None
) -> Terrain:
    """Describe the landscape of one instance.

    Args:
        tables: Of 0, 1, ..., k blocks of it.
        index: Its index in the split.
        family: Its question family.
        selections: What other methods keep, bool (R, N) each: R selections of exactly k.

    Random selections and swap ascent are exact: over all selections, and over all of them as starts.
    """
    table = tables[-1]
    ends = climb(table)
    optima, basins = np.unique(ends, return_counts=True)
    everything = np.arange(len(table))
    methods = {"random": _stand(table, everything, np.ones(len(table)))}
    for name, chosen in (selections or {}).items():
        methods[name] = _stand(table, table.rows(chosen), np.ones(len(chosen)))
    methods["greedy forward"] = _stand(table, table.rows(greedy(tables)[None]), np.ones(1))
    methods["swap ascent"] = _stand(table, optima, basins)
    return Terrain(
        index=index,
        family=family,
        k=table.k,
        optimal_reward=table.optimal_reward,
        spread=float(table.rewards.std()),
        local_optima=len(optima),
        worst_optimum=table.optimal_reward - float(table.rewards[optima].min()),
        curvature=curvature(tables),
        methods=methods,
        rewards=np.sort(table.rewards),
    )


def _stand(table: RewardTable, rows: np.ndarray, weights: np.ndarray) -> Standing:
    gaps, percentiles = table.optimal_reward - table.rewards[rows], table.percentiles(rows)
    return Standing(*(float(np.average(values, weights=weights)) for values in (gaps, percentiles, gaps <= ROUNDING)))
