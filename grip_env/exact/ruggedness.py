"""Ruggedness of the reward: local optima under swaps, and interactions between tokens.

All results are exact, over tables of every selection (:class:`~grip_env.exact.reward_table.RewardTable`).
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
"""Tolerance for rounding differences between a frozen model's scores, in nats.

Second differences up to it count as zero, and selections this close to the optimum as optimal.
"""


# -- swaps -----------------------------------------------------------------------------------------------------


def best_swaps(table: RewardTable) -> np.ndarray:
    """Return the row of the best selection one swap away from each row, int64 (S,).

    A swap replaces one token by another. If no swap gives a strictly larger reward, the selection is a local optimum,
    and the row is its own. Among several best swaps, the first row is taken.
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
    """Return the row where best-improvement swap ascent from each row ends, int64 (S,).

    The rows that occur are the local optima, and the number of times each occurs is the size of its basin.
    """
    ends = best_swaps(table)
    while not np.array_equal(ends, ends[ends]):
        ends = ends[ends]  # each iteration doubles the number of swaps taken
    return ends


# -- differences -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curvature:
    """First and second differences of a reward f over all selections S of at most K tokens.

    The first differences are f(S + x) - f(S), for every S with |S| < K and every x outside S; the second differences
    are f(S + x + y) - f(S + x) - f(S + y) + f(S), for every S with |S| < K - 1 and all pairs x, y outside S.

    f is submodular up to K, that is, f(A + x) - f(A) >= f(B + x) - f(B) for all subsets A of B with |B| < K and all x
    outside B, if and only if no second difference is positive. This is the condition for B = A + y, and the conditions
    for larger B are sums of such.
    """

    violations: float
    """Share of second differences above ROUNDING, which violate submodularity."""
    violation_size: float
    """Mean of the second differences above ROUNDING, 0 if there are none."""
    interaction: float
    """Mean absolute second difference divided by the mean absolute first one; 0 if rewards of tokens add up."""
    decreasing: float
    """Share of first differences below -ROUNDING, where adding a token lowers the reward."""


def curvature(tables: Sequence[RewardTable]) -> Curvature:
    """Return the curvature, given tables of 0, 1, ..., K tokens of one instance.

    Raises:
        ValueError: If the tables are not of 0, 1, ..., K tokens, or K is below 2.
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
    """Return the result of greedy forward selection, bool (N,).

    The best token is added repeatedly until K tokens are selected.

    Args:
        tables: Tables of 0, 1, ..., K tokens of one instance.
    """
    chosen = tables[0].masks[0]
    for table in tables[1:]:
        candidates = np.sort(tables[1].masks[(tables[1].masks & chosen) == 0] | chosen)
        chosen = candidates[table.rewards[table.find(candidates)].argmax()]
    return tables[-1].selection(int(tables[-1].find(np.array([chosen]))[0]))


# -- one instance ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Standing:
    """Quality of a method's selections of an instance, averaged over its random choices."""

    gap: float
    """Optimal reward minus the reward of the selections."""
    percentile: float
    """Share of all selections with a smaller reward, plus half of those with the same reward."""
    optimal: float
    """Share of the selections that are optimal, at most ROUNDING below the optimum."""


@dataclass(frozen=True)
class Terrain:
    """Reward landscape of one instance at one k."""

    index: int
    family: str
    k: int
    optimal_reward: float
    spread: float
    """Standard deviation of the reward over all selections."""
    local_optima: int
    """Number of selections that no swap improves, the global optimum included."""
    worst_optimum: float
    """Optimal reward minus the reward of the worst local optimum."""
    curvature: Curvature
    """Curvature over all selections of at most k blocks."""
    methods: dict[str, Standing]
    rewards: np.ndarray = field(repr=False)
    """Rewards of all selections, ascending, float64 (S,)."""

    def plain(self) -> dict[str, Any]:
        """Return a dict for the JSON file, without ``rewards``."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "rewards"}


def explore(
    tables: Sequence[RewardTable], index: int, family: str, selections: Mapping[str, np.ndarray] | None = None
) -> Terrain:
    """Return the reward landscape of one instance.

    Args:
        tables: Tables of 0, 1, ..., k blocks of the instance.
        index: Index of the instance in the split.
        family: Question family of the instance.
        selections: Selections of other methods by name, bool (R, N) each: R selections of exactly k blocks.

    Results for random selection and swap ascent are exact, over all selections and over all starting points.
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
