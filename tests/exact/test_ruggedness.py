"""Against independent, slow implementations over Python sets."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest

from grip_env.exact.reward_table import RewardTable, as_selections, subset_masks
from grip_env.exact.ruggedness import best_swaps, climb, curvature, explore, greedy

Values = dict[frozenset[int], float]
N = 7


def valued(function: Callable[[frozenset[int]], float], largest: int = 4, count: int = N) -> Values:
    return {
        frozenset(kept): function(frozenset(kept))
        for size in range(largest + 1)
        for kept in combinations(range(count), size)
    }


def random_values(seed: int, largest: int = 4, digits: int = 9) -> Values:
    generator = np.random.default_rng(seed)
    return valued(lambda kept: round(float(generator.normal()), digits), largest)


def tabled(values: Values, count: int = N) -> list[RewardTable]:
    tables = []
    for size in range(max(map(len, values)) + 1):
        masks = subset_masks(range(count), size)
        sets = [frozenset(np.flatnonzero(row).tolist()) for row in as_selections(masks, count)]
        tables.append(RewardTable(masks, np.array([values[kept] for kept in sets]), count))
    return tables


def members(table: RewardTable, row: int) -> frozenset[int]:
    return frozenset(np.flatnonzero(table.selection(row)).tolist())


def swaps(kept: frozenset[int]) -> list[frozenset[int]]:
    return [kept - {out} | {into} for out in kept for into in set(range(N)) - kept]


# -- swaps -----------------------------------------------------------------------------------------------


def step(kept: frozenset[int], values: Values, order: dict[frozenset[int], int]) -> frozenset[int]:
    best = max(swaps(kept), key=lambda other: (values[other], -order[other]))
    return best if values[best] > values[kept] else kept


def climbed(kept: frozenset[int], values: Values, order: dict[frozenset[int], int]) -> frozenset[int]:
    above = step(kept, values, order)
    return kept if above == kept else climbed(above, values, order)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("digits", [9, 0])  # 0: nearly all rewards are tied with others
def test_swap_ascent_is_that_of_a_slow_implementation(k: int, digits: int) -> None:
    for seed in range(5):
        values = random_values(seed, digits=digits)
        table = tabled(values)[k]
        order = {members(table, row): row for row in range(len(table))}

        found, ends = best_swaps(table), climb(table)
        assert [members(table, row) for row in found] == [step(kept, values, order) for kept in order]
        assert [members(table, row) for row in ends] == [climbed(kept, values, order) for kept in order]
        optima = {kept for kept in order if all(values[other] <= values[kept] for other in swaps(kept))}
        assert {members(table, row) for row in set(ends.tolist())} == optima


def test_rewards_that_add_up_have_one_optimum() -> None:
    weights = np.random.default_rng(0).permutation(N)
    table = tabled(valued(lambda kept: float(sum(weights[list(kept)]))))[3]
    assert set(climb(table).tolist()) == {int(table.rewards.argmax())}


# -- differences -----------------------------------------------------------------------------------------


def slow_differences(values: Values, largest: int) -> tuple[list[float], list[float]]:
    first, second = [], []
    for kept in values:
        others = sorted(set(range(N)) - kept)
        if len(kept) < largest:
            first += [values[kept | {x}] - values[kept] for x in others]
        if len(kept) < largest - 1:
            second += [
                values[kept | {x, y}] - values[kept | {x}] - values[kept | {y}] + values[kept]
                for x, y in combinations(others, 2)
            ]
    return first, second


@pytest.mark.parametrize("largest", [2, 3, 4])
def test_curvature_is_that_of_a_slow_implementation(largest: int) -> None:
    values = random_values(3, largest)
    first, second = slow_differences(values, largest)
    found = curvature(tabled(values))
    positive = [value for value in second if value > 1e-4]
    assert found.violations == pytest.approx(len(positive) / len(second))
    assert found.violation_size == pytest.approx(np.mean(positive))
    assert found.interaction == pytest.approx(np.mean(np.abs(second)) / np.mean(np.abs(first)))
    assert found.decreasing == pytest.approx(np.mean([value < -1e-4 for value in first]))


def violates(values: Values, largest: int) -> bool:
    """Submodularity by its definition."""
    return any(
        values[small | {x}] - values[small] < values[large | {x}] - values[large] - 1e-4
        for large in values
        if len(large) < largest
        for small in values
        if small < large
        for x in set(range(N)) - large
    )


def coverage(kept: frozenset[int]) -> float:
    return float(len(set().union(*({x, (3 * x + 1) % 5, x // 2} for x in kept))))


def test_coverage_is_submodular_and_squares_are_not() -> None:
    covered = valued(coverage)
    found = curvature(tabled(covered))
    assert not violates(covered, 4)
    assert (found.violations, found.violation_size, found.decreasing) == (0.0, 0.0, 0.0)
    assert found.interaction > 0

    squares = valued(lambda kept: float(len(kept) ** 2))
    found = curvature(tabled(squares))
    assert violates(squares, 4)
    assert found.violations == 1.0
    assert found.violation_size == pytest.approx(2.0)  # (n + 2)^2 - 2 (n + 1)^2 + n^2

    # one pair that does more together than apart is found as well
    paired = valued(lambda kept: coverage(kept) + (3.0 if {1, 4} <= kept else 0.0))
    assert violates(paired, 4)
    assert 0 < curvature(tabled(paired)).violations < 1


def test_rewards_that_add_up_do_not_interact() -> None:
    weights = np.random.default_rng(0).normal(size=N)
    found = curvature(tabled(valued(lambda kept: float(sum(weights[list(kept)])))))
    assert found.violations == 0.0
    assert found.interaction == pytest.approx(0.0, abs=1e-12)
    assert found.decreasing == pytest.approx((weights < 0).mean())
    flat = curvature(tabled(valued(lambda kept: 1.0)))
    assert vars(flat) == {"violations": 0.0, "violation_size": 0.0, "interaction": 0.0, "decreasing": 0.0}


def test_curvature_needs_every_size() -> None:
    tables = tabled(random_values(0))
    for some in (tables[:2], tables[1:], [tables[0], tables[1], tables[3]]):
        with pytest.raises(ValueError, match=r"0, 1, ..., K tokens with K at least 2; got"):
            curvature(some)


# -- one instance ----------------------------------------------------------------------------------------


def test_greedy_adds_the_best_token_each_time() -> None:
    for seed in range(5):
        values = random_values(seed)
        kept: frozenset[int] = frozenset()
        for _ in range(4):
            kept = max((kept | {x} for x in range(N) if x not in kept), key=lambda other: values[other])
        assert set(np.flatnonzero(greedy(tabled(values))).tolist()) == kept


def test_terrain_holds_every_method_against_the_optimum() -> None:
    values = random_values(1)
    tables = tabled(values)
    rewards = {kept: value for kept, value in values.items() if len(kept) == 4}
    best = max(rewards.values())
    chosen = np.array([[1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1]], dtype=bool)
    terrain = explore(tables, 5, "kind", {"mine": chosen})
    assert (terrain.index, terrain.family, terrain.k) == (5, "kind", 4)
    assert list(terrain.methods) == ["random", "mine", "greedy forward", "swap ascent"]
    assert terrain.optimal_reward == best
    assert terrain.spread == pytest.approx(np.std(list(rewards.values())))
    np.testing.assert_array_equal(terrain.rewards, sorted(rewards.values()))
    random = terrain.methods["random"]
    assert random.gap == pytest.approx(best - np.mean(list(rewards.values())))
    assert (random.percentile, random.optimal) == (pytest.approx(0.5), pytest.approx(1 / 35))
    own = [values[frozenset(range(4))], values[frozenset(range(3, 7))]]
    assert terrain.methods["mine"].gap == pytest.approx(best - np.mean(own))
    places = [(sum(other < value for other in rewards.values()) + 0.5) / 35 for value in own]
    assert terrain.methods["mine"].percentile == pytest.approx(np.mean(places))
    ends = [values[members(tables[4], row)] for row in climb(tables[4])]
    assert terrain.methods["swap ascent"].gap == pytest.approx(best - np.mean(ends))
    assert terrain.methods["swap ascent"].optimal == pytest.approx(np.mean([end == best for end in ends]))
    assert terrain.local_optima == len(set(ends))
    assert terrain.worst_optimum == pytest.approx(best - min(ends))
    assert "rewards" not in terrain.plain()
    assert terrain.plain()["curvature"] == vars(curvature(tables))
