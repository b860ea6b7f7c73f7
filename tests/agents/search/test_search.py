"""Searches on instances whose every selection has a known worth, against plain loops and exhaustive checks."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch

from agents.base import Selector, top_k
from agents.heuristics import all_tokens, random_tokens
from agents.methods import METHODS
from agents.search.base import Search
from agents.search.cross_entropy import CrossEntropy, fit_marginals
from agents.search.local import ExactEnumeration, GreedyBackward, GreedyForward, RandomSearch, SwapSearch, removal_plan
from grip_env.exact.reward_table import MAX_SUBSETS, RewardTable
from grip_env.exact.ruggedness import best_swaps, greedy
from grip_env.reports.comparison import compare
from grip_env.rewards.terms import AnswerProbability, KeptFraction
from grip_env.tasks.base import Example
from grip_env.vlms.base import Encoded, Scores
from grip_env.vlms.blocks import BlockVLM
from grip_env.vlms.huggingface import HuggingFaceVLM
from tests.fakes import FakeTask, FakeVLM

SEARCHES: dict[str, Any] = {one.title: one.run for one in METHODS.values() if "answer" in one.needs}

ALL = [RandomSearch, GreedyForward, GreedyBackward, SwapSearch, CrossEntropy, ExactEnumeration]
SAMPLING = [RandomSearch, GreedyForward, GreedyBackward, SwapSearch, CrossEntropy]


class TableVLM(FakeVLM):
    """Answers by a table over all 2^N selections of each example, and counts what it is asked.

    Args:
        worth: Log-likelihoods of an example's selections, bit i for token i, (2^N,), by the example's index.
        side: As for FakeVLM.
        padded: Whether example i has 2 i tokens fewer than the first.
    """

    def __init__(self, worth: Callable[[int], np.ndarray], side: int = 3, padded: bool = False) -> None:
        super().__init__(side, (lambda example: side**2 - 2 * self.index(example)) if padded else None)
        self.tables = {index: np.asarray(worth(index), dtype=np.float32) for index in range(4)}
        self.asked: dict[int, list[frozenset[int]]] = {index: [] for index in range(4)}  # but for empty selections

    @staticmethod
    def index(example: Example) -> int:
        return int(example.key.rpartition("/")[2])

    def worth(self, index: int, chosen: Any) -> float:
        return float(self.tables[index][sum(1 << int(token) for token in chosen)])

    def log_likelihood(
        self, encoded: Encoded, selection: torch.Tensor, tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        bits = (selection.long() << torch.arange(selection.shape[-1])).sum(-1)
        rows = [self.index(example) for example in encoded.examples]
        for row, group in zip(rows, selection, strict=True):
            sets = [frozenset(one.nonzero().flatten().tolist()) for one in group]
            self.asked[row] += [one for one in sets if one]
        return torch.stack([torch.from_numpy(self.tables[row])[own] for row, own in zip(rows, bits, strict=True)])


def rugged(index: int, count: int = 9) -> np.ndarray:
    """Worth without any structure."""
    return -np.random.default_rng(100 + index).exponential(size=2**count)


def members(count: int) -> np.ndarray:
    return (np.arange(2**count)[:, None] >> np.arange(count) & 1).astype(float)


def additive(index: int, count: int = 9) -> np.ndarray:
    return members(count) @ np.random.default_rng(200 + index).normal(size=count)


def quadratic(index: int, count: int = 9) -> np.ndarray:
    rng, x = np.random.default_rng(300 + index), members(count)
    return x @ rng.normal(size=count) + np.einsum("si,ij,sj->s", x, rng.normal(size=(count, count)), x)


def batch(vlm: FakeVLM, count: int = 4) -> Encoded:
    task = FakeTask()
    return vlm.encode([task.example("train", index) for index in range(count)])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def chosen(selection: torch.Tensor) -> list[set[int]]:
    return [set(row.nonzero().flatten().tolist()) for row in selection]


def smallest(kind: type[Search]) -> int:
    """Fewest calls that a search of some kind can be made with."""
    return 2 if kind is SwapSearch else 1


# -- what every search promises --------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ALL)
def test_exactly_k_real_tokens_are_kept_and_told_with_what_they_are_worth(kind: type[Search], padded: bool) -> None:
    vlm = TableVLM(rugged, padded=padded)
    encoded = batch(vlm)
    for kept in ([1, 2, 3, 2], [3, 3, 3, 3], [8, 6, 4, 3], [9, 7, 5, 3], [2, 7, 99, 1]):
        result = kind(300).search(vlm, encoded, torch.tensor(kept), generator())
        assert isinstance(kind(300), Selector)
        real = encoded.token_mask.sum(1).tolist()
        assert result.selection.dtype == torch.bool
        assert result.selection.sum(1).tolist() == [min(k, n) for k, n in zip(kept, real, strict=True)]
        assert not (result.selection & ~encoded.token_mask).any()
        expected = [vlm.worth(row, own) for row, own in enumerate(chosen(result.selection))]
        torch.testing.assert_close(result.value, torch.tensor(expected))
        forced = [k >= n for k, n in zip(kept, real, strict=True)]
        assert [reason == "only choice" for reason in result.stopped] == forced


@pytest.mark.parametrize("reward", [None, "probability"])
@pytest.mark.parametrize("kind", SAMPLING)
def test_calls_are_counted_and_never_exceed_the_budget(kind: type[Search], reward: str | None) -> None:
    extra = smallest(kind) if reward else 0  # for the full image
    for calls in [*range(smallest(kind) + extra, 24), 40, 63, 64, 65, 90, 150, 400]:
        vlm = TableVLM(rugged, padded=True)
        encoded = batch(vlm)
        result = kind(calls, reward).search(vlm, encoded, torch.tensor([4, 2, 5, 1]), generator(calls))
        asked = [len(vlm.asked[row]) for row in range(4)]
        assert result.calls.tolist() == asked, calls
        assert max(asked) <= calls
        assert result.selection.sum(1).tolist() == [4, 2, 5, 1]
        tried = [{own for own in vlm.asked[row] if len(own) == k} for row, k in enumerate([4, 2, 5, 1])]
        for row, own in enumerate(chosen(result.selection)):
            assert own in tried[row], "what is returned was scored"
        if kind in (RandomSearch, SwapSearch, CrossEntropy):  # that score complete selections
            best = [max(vlm.worth(row, own) for own in sets) for row, sets in enumerate(tried)]
            assert result.value.tolist() == pytest.approx(best if reward is None else np.exp(best).tolist())


@pytest.mark.parametrize("kind", SAMPLING)
def test_choices_follow_from_the_generator_alone(kind: type[Search]) -> None:
    def run(seed: int) -> torch.Tensor:
        vlm = TableVLM(rugged)
        return kind(8)(vlm, batch(vlm), torch.tensor([4, 2, 5, 3]), generator(seed))

    state = torch.get_rng_state()
    one, same = run(0), run(0)
    assert torch.get_rng_state().equal(state)
    assert one.equal(same)
    assert any(not run(seed).equal(one) for seed in range(1, 6))


@pytest.mark.parametrize("kind", [GreedyForward, GreedyBackward, SwapSearch, ExactEnumeration])
def test_of_equals_the_lower_index_is_kept(kind: type[Search]) -> None:
    vlm = TableVLM(lambda index: np.zeros(2**9))
    encoded = batch(vlm)
    kept = torch.tensor([1, 3, 4, 8])
    search = SwapSearch(400, start=first_tokens) if kind is SwapSearch else kind(400)
    assert search(vlm, encoded, kept, generator()).equal(first_tokens(vlm, encoded, kept, generator()))


def first_tokens(vlm: Any, encoded: Encoded, kept: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return top_k(torch.zeros(encoded.token_mask.shape), kept, encoded.token_mask)


@pytest.mark.parametrize("kind", ALL)
def test_what_it_uses_is_said_wherever_it_is_named(kind: type[Search]) -> None:
    assert "uses the answer" in (kind.__doc__ or "")
    assert kind().label.endswith("(uses the answer)")
    assert kind.uses_answer


def test_every_search_in_the_tables_says_that_it_uses_the_answer() -> None:
    vlm, task = FakeVLM(), FakeTask()
    small = {name: replace(search, calls=30) for name, search in SEARCHES.items()}
    table = compare(vlm, task, small, "train", 4, budgets=(0.2,), progress=False).markdown()
    assert len(re.findall(r"^\| [a-z -]+ \(uses the answer\) \|", table, re.MULTILINE)) == 2 * len(SEARCHES)


# -- rewards ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_any_reward_can_be_maximised_and_its_full_image_is_a_call(kind: type[Search]) -> None:
    def odd(scores: Scores, full: Scores) -> torch.Tensor:
        assert full.log_likelihood.shape[1] == 1
        return (scores.log_likelihood * 7).sin() + full.log_likelihood

    for reward in (odd, 2 * AnswerProbability() - KeptFraction(), "agreement"):
        vlm = TableVLM(rugged, padded=True)
        encoded = batch(vlm)
        result = kind(200, reward).search(vlm, encoded, torch.tensor([2, 3, 1, 2]), generator())
        assert result.calls.tolist() == [len(vlm.asked[row]) for row in range(4)]
        full = vlm.score(encoded, encoded.full_selection(), first_token=True)
        scores = vlm.score(encoded, result.selection[:, None], reference=full.first_token)
        judged: Any = scores.agreement if isinstance(reward, str) else reward(scores, full)
        torch.testing.assert_close(result.value, judged[:, 0])
        exact = ExactEnumeration(300, reward).search(vlm, encoded, torch.tensor([2, 3, 1, 2]), generator())
        assert (result.value <= exact.value + 1e-6).all()


def test_log_likelihood_and_the_reward_of_the_environments_have_the_same_best_selections() -> None:
    vlm = TableVLM(rugged)
    kept = torch.tensor([1, 2, 3, 4])
    plain, named = (GreedyForward(400, reward).search(vlm, batch(vlm), kept, generator()) for reward in (None, NAMED))
    assert plain.selection.equal(named.selection)
    full = torch.tensor([vlm.worth(row, range(9)) for row in range(4)])
    torch.testing.assert_close(plain.value, named.value + full)
    assert (named.calls - plain.calls).tolist() == [1, 1, 1, 1]


NAMED = "log_likelihood"


# -- greedy forward --------------------------------------------------------------------------------------


def plain_forward(worth: Callable[[set[int]], float], tokens: list[int], k: int) -> set[int]:
    kept: set[int] = set()
    while len(kept) < k:
        best, best_worth = -1, -math.inf
        for token in tokens:
            if token not in kept and worth(kept | {token}) > best_worth:
                best, best_worth = token, worth(kept | {token})
        kept.add(best)
    return kept


@pytest.mark.parametrize("worth", [rugged, quadratic, additive])
@pytest.mark.parametrize("padded", [False, True])
def test_greedy_forward_equals_plain_loops(worth: Callable[[int], np.ndarray], padded: bool) -> None:
    vlm = TableVLM(worth, padded=padded)
    encoded = batch(vlm)
    for kept in ([1, 2, 2, 1], [4, 3, 1, 2], [8, 6, 4, 2]):
        vlm.score_calls.clear()
        result = GreedyForward(1000).search(vlm, encoded, torch.tensor(kept), generator())
        assert len(vlm.score_calls) == max(kept), "a round is one call of the model, for all examples"
        assert result.stopped == ("complete",) * 4
        for row, own in enumerate(chosen(result.selection)):
            real = int(encoded.token_mask[row].sum())
            expected = plain_forward(lambda some, row=row: vlm.worth(row, some), list(range(real)), kept[row])  # type: ignore[misc]
            assert own == expected
            assert result.calls[row] == sum(real - step for step in range(kept[row]))


@pytest.mark.parametrize("calls", [1, 2, 5, 7, 10, 17, 24])
def test_greedy_forward_shares_a_small_budget_among_its_rounds(calls: int) -> None:
    vlm = TableVLM(rugged)
    result = GreedyForward(calls).search(vlm, batch(vlm, 2), torch.tensor([5, 5]), generator(calls))
    assert result.stopped == ("budget",) * 2
    for row in range(2):
        assert len(vlm.asked[row]) == calls
        sizes = [len(own) for own in vlm.asked[row]]
        rounds = [[own for own in vlm.asked[row] if len(own) == size] for size in sorted(set(sizes))]
        assert sizes == sorted(sizes)
        assert sizes[-1] == 5
        assert len(rounds) == min(5, max(1, calls // 2)), "with few calls, the first tokens are random"
        assert max(map(len, rounds)) - min(map(len, rounds)) <= 1
        for before, after in pairwise(rounds):
            best = max(before, key=lambda own: vlm.worth(row, own))
            assert all(own > best for own in after), "each round builds on the best of the one before"
            assert len(set(after)) == len(after)
        assert chosen(result.selection)[row] == max(rounds[-1], key=lambda own: vlm.worth(row, own))


def test_greedy_forward_tries_tokens_evenly_when_it_samples_them() -> None:
    tried = np.zeros(9)
    for seed in range(150):
        vlm = TableVLM(rugged)
        GreedyForward(3)(vlm, batch(vlm), torch.ones(4, dtype=torch.long), generator(seed))
        for row in range(4):
            for own in vlm.asked[row]:
                tried[list(own)] += 1
    assert tried.sum() == 150 * 4 * 3
    assert np.abs(tried / 600 - 1 / 3).max() < 0.08  # four standard errors


# -- greedy backward -------------------------------------------------------------------------------------


def plain_backward(worth: Callable[[set[int]], float], kept: set[int], plan: list[int]) -> set[int]:
    for count in plan:
        without = sorted(kept, key=lambda token: (-worth(kept - {token}), -token))
        kept = kept - set(without[:count])
    return kept


@pytest.mark.parametrize("worth", [rugged, quadratic, additive])
@pytest.mark.parametrize("padded", [False, True])
def test_greedy_backward_equals_plain_loops(worth: Callable[[int], np.ndarray], padded: bool) -> None:
    vlm = TableVLM(worth, padded=padded)
    encoded = batch(vlm)
    for kept in ([1, 2, 2, 1], [4, 3, 1, 2], [8, 6, 4, 2]):
        vlm.score_calls.clear()
        result = GreedyBackward(1000).search(vlm, encoded, torch.tensor(kept), generator())
        assert result.stopped == ("complete",) * 4
        real = encoded.token_mask.sum(1).tolist()
        assert len(vlm.score_calls) == max(n - k for n, k in zip(real, kept, strict=True))
        for row, own in enumerate(chosen(result.selection)):
            plan = [1] * (real[row] - kept[row])
            assert own == plain_backward(lambda some, row=row: vlm.worth(row, some), set(range(real[row])), plan)  # type: ignore[misc]


def test_greedy_backward_removes_several_tokens_a_round_where_calls_are_few() -> None:
    vlm = TableVLM(lambda index: quadratic(index, 16), side=4)
    for calls in (17, 20, 30, 40, 60, 100):
        start, plan = removal_plan(16, 3, calls)
        assert start == 16
        result = GreedyBackward(calls).search(vlm, batch(vlm), torch.full((4,), 3), generator())
        assert result.stopped == ("budget",) * 4
        for row, own in enumerate(chosen(result.selection)):
            assert own == plain_backward(lambda some, row=row: vlm.worth(row, some), set(range(16)), plan)  # type: ignore[misc]


def test_greedy_backward_starts_from_fewer_tokens_where_not_even_a_round_is_affordable() -> None:
    vlm = TableVLM(rugged)
    result = GreedyBackward(6).search(vlm, batch(vlm), torch.full((4,), 2), generator())
    for row in range(4):
        start = frozenset.union(*vlm.asked[row])
        assert len(start) == 5
        assert chosen(result.selection)[row] == plain_backward(
            lambda some, row=row: vlm.worth(row, some), set(start), [3]
        )  # type: ignore[misc]


def plan_cost(start: int, plan: list[int]) -> int:
    cost = 0
    for removed in plan:
        cost, start = cost + start, start - removed
    return cost + (not plan or plan[-1] > 1)


@pytest.mark.parametrize(("count", "k"), [(2, 1), (9, 1), (9, 8), (16, 4), (144, 7), (144, 100)])
def test_plans_of_removal_are_the_gentlest_that_the_calls_allow(count: int, k: int) -> None:
    everything = sum(range(k + 1, count + 1))
    gentlest = 0
    for calls in sorted({*range(1, 40), *range(40, everything + 40, 29), everything - 1, everything} - {0, -1}):
        start, plan = removal_plan(count, k, calls)
        assert plan_cost(start, plan) <= calls
        assert start - sum(plan) == k
        assert min(plan, default=1) >= 1
        rounds = len(plan)
        assert rounds >= gentlest, "more calls, more rounds"
        gentlest = rounds
        if start < count:  # not even all at once
            assert plan_cost(start + 1, [start + 1 - k]) > calls
    assert (start, plan) == (count, [1] * (count - k))
    assert removal_plan(count, k, everything) == (start, plan)
    assert count == k + 1 or removal_plan(count, k, everything - 1)[1] != plan


# -- swaps -----------------------------------------------------------------------------------------------


def swaps(kept: set[int], tokens: int) -> list[set[int]]:
    return [kept - {out} | {into} for out in kept for into in set(range(tokens)) - kept]


@pytest.mark.parametrize("group", [1, 5, 1000])
@pytest.mark.parametrize("worth", [rugged, quadratic])
def test_swap_search_ends_where_no_swap_helps(worth: Callable[[int], np.ndarray], group: int) -> None:
    for seed in range(6):
        vlm = TableVLM(worth, padded=True)
        encoded = batch(vlm)
        result = SwapSearch(5000, start=random_tokens, group=group).search(
            vlm, encoded, torch.tensor([4, 3, 2, 1]), generator(seed)
        )
        assert result.stopped == ("local optimum",) * 4
        for row, own in enumerate(chosen(result.selection)):
            real = int(encoded.token_mask[row].sum())
            assert all(vlm.worth(row, other) <= vlm.worth(row, own) for other in swaps(own, real))


@pytest.mark.parametrize("group", [1, 3, 1000])
def test_swap_search_moves_to_the_best_of_each_round(group: int) -> None:
    vlm = TableVLM(rugged)
    result = SwapSearch(5000, start=random_tokens, group=group).search(
        vlm, batch(vlm, 1), torch.tensor([3]), generator()
    )
    current, tried = set(vlm.asked[0][0]), set()
    rest = vlm.asked[0][1:]
    while rest:
        size = min(group, 18 - len(tried))
        part, rest = rest[:size], rest[size:]
        assert all(set(own) in swaps(current, 9) for own in part)
        assert len(part) == size
        assert tried.isdisjoint(part), "no swap of a set is tried twice"
        best = max(part, key=lambda own: vlm.worth(0, own))
        tried |= set(part)
        if vlm.worth(0, best) > vlm.worth(0, current):
            current, tried = set(best), set()
    assert len(tried) == 18
    assert chosen(result.selection)[0] == current


def test_swap_search_starts_from_what_it_is_given_made_up_to_k() -> None:
    def few(vlm: Any, encoded: Encoded, kept: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return top_k(torch.arange(9.0).expand(len(encoded), -1), kept - 1, encoded.token_mask)

    vlm = TableVLM(rugged)
    SwapSearch(1, start=few)(vlm, batch(vlm), torch.full((4,), 4), generator())
    for row in range(4):
        (begin,) = vlm.asked[row]
        assert {6, 7, 8} < begin
        assert len(begin) == 4
    vlm = TableVLM(rugged)
    SwapSearch(1, start=all_tokens)(vlm, batch(vlm), torch.full((4,), 4), generator())
    assert [len(vlm.asked[row][0]) for row in range(4)] == [4] * 4
    assert len({vlm.asked[row][0] for row in range(4)}) > 1


def test_swap_search_counts_the_calls_of_the_search_it_starts_from() -> None:
    vlm = TableVLM(rugged)
    kept = torch.full((4,), 3)
    for start in (None, RandomSearch(12), GreedyForward(20, "probability")):
        vlm = TableVLM(rugged)
        result = SwapSearch(40, start=start).search(vlm, batch(vlm), kept, generator())
        assert result.calls.tolist() == [len(vlm.asked[row]) for row in range(4)]
        # a set has 18 swaps: whoever makes fewer calls than it may has tried all of them in vain
        assert [reason == "local optimum" for reason in result.stopped] == (result.calls < 40).tolist()
    begun = GreedyForward(20).search(vlm, batch(vlm), kept, generator())
    assert (SwapSearch(40).search(vlm, batch(vlm), kept, generator()).value >= begun.value).all()
    with pytest.raises(ValueError, match="swap search needs a budget of at least 13 calls; got 12"):
        SwapSearch(12, start=RandomSearch(12))


# -- cross-entropy method --------------------------------------------------------------------------------


def test_cross_entropy_finds_the_optimum_of_an_additive_worth() -> None:
    vlm = TableVLM(lambda index: additive(index, 16), side=4)
    kept = torch.tensor([2, 5, 8, 12])
    result = CrossEntropy(3000).search(vlm, batch(vlm), kept, generator())
    assert result.stopped == ("converged",) * 4
    for row, own in enumerate(chosen(result.selection)):
        weights = vlm.tables[row][1 << np.arange(16)]
        assert own == set(np.argsort(-weights)[: kept[row]].tolist())


def test_cross_entropy_beats_as_many_random_draws_where_tokens_interact() -> None:
    gains = []
    for seed in range(5):
        vlm = TableVLM(lambda index, seed=seed: quadratic(10 * seed + index, 16), side=4)  # type: ignore[misc]
        kept = torch.full((4,), 8)
        found = [kind(512).search(vlm, batch(vlm), kept, generator(seed)) for kind in (CrossEntropy, RandomSearch)]
        gains.append(found[0].value - found[1].value)
    gain = torch.cat(gains)
    assert gain.mean() > 2 * gain.std() / len(gain) ** 0.5


def test_fitted_marginals_are_those_of_the_law_by_enumeration() -> None:
    rng = np.random.default_rng(0)
    kept, real = [1, 3, 5, 4], [2, 6, 6, 5]
    target, mask = np.zeros((4, 6)), np.arange(6) < np.array(real)[:, None]
    for row, (k, n) in enumerate(zip(kept, real, strict=True)):
        elite = np.array([rng.permutation(np.arange(n) < k) for _ in range(40)])
        target[row, :n] = elite.mean(0)
    theta = fit_marginals(
        torch.tensor(target).float(), torch.tensor(kept), torch.tensor(mask), torch.zeros(4, 6), rounds=60
    ).double()
    assert theta.isfinite().all()
    for row, (k, n) in enumerate(zip(kept, real, strict=True)):
        sets = list(combinations(range(n), k))
        weight = np.array([math.exp(sum(float(theta[row, token]) for token in some)) for some in sets])
        share = [weight[[token in some for some in sets]].sum() / weight.sum() for token in range(n)]
        np.testing.assert_allclose(share, target[row, :n], atol=2e-3)


# -- exact enumeration -----------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
def test_enumeration_finds_the_best_of_all_selections(padded: bool) -> None:
    vlm = TableVLM(rugged, padded=padded)
    encoded = batch(vlm)
    kept = [4, 3, 2, 1]
    result = ExactEnumeration().search(vlm, encoded, torch.tensor(kept), generator())
    assert result.stopped == ("optimum",) * 4
    for row, own in enumerate(chosen(result.selection)):
        real = int(encoded.token_mask[row].sum())
        sets = list(combinations(range(real), kept[row]))
        assert own == set(max(sets, key=lambda some: vlm.worth(row, some)))
        assert result.calls[row] == len(sets)
        assert sorted(map(sorted, vlm.asked[row])) == sorted(map(list, sets))


@pytest.mark.parametrize("kind", SAMPLING)
def test_no_search_beats_the_optimum_and_each_reaches_it_somewhere(kind: type[Search]) -> None:
    reached = 0
    for seed in range(8):
        vlm = TableVLM(lambda index, seed=seed: quadratic(4 * seed + index), padded=True)  # type: ignore[misc]
        encoded, kept = batch(vlm), torch.tensor([3, 3, 2, 1])
        best = ExactEnumeration().search(vlm, encoded, kept, generator()).value
        found = kind(300).search(vlm, encoded, kept, generator(seed)).value
        assert (found <= best + 1e-6).all()
        reached += int((found > best - 1e-6).sum())
    assert reached >= 16


def test_enumeration_shows_the_arithmetic_of_what_is_too_many_and_scores_nothing() -> None:
    vlm = TableVLM(lambda index: np.zeros(2**9), padded=True)
    encoded = batch(vlm)
    with pytest.raises(ValueError, match=r"example 1 .* C\(7, 3\) = 35 selections to score, more than .* 34 calls"):
        ExactEnumeration(34)(vlm, encoded, torch.tensor([1, 3, 2, 1]), generator())
    with pytest.raises(ValueError, match=r"C\(7, 3\) = 35 selections and the full image to score"):
        ExactEnumeration(35, "exact_match")(vlm, encoded, torch.tensor([1, 3, 2, 1]), generator())
    wide = FakeVLM(side=6)
    with pytest.raises(ValueError, match=rf"C\(36, 7\) = 8,347,680 ways .* \(at most {MAX_SUBSETS:,}\)"):
        ExactEnumeration()(wide, batch(wide), torch.tensor([1, 1, 7, 1]), generator())
    assert not vlm.score_calls
    assert not wide.score_calls


# -- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_examples_without_answers_are_refused_before_anything_is_scored(kind: type[Search]) -> None:
    vlm = TableVLM(rugged)
    encoded = batch(vlm)
    encoded.answer_lengths[2] = 0
    with pytest.raises(ValueError, match="a search uses the answer, and example 2 of the batch has none"):
        kind()(vlm, encoded, torch.full((4,), 2), generator())
    assert not vlm.score_calls


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (torch.tensor([2, 2, 2]), r"integers of shape \(4,\), one for each example; got torch.int64 of shape \(3,\)"),
        (torch.full((4,), 0.5), r"got torch.float32 of shape \(4,\)"),
        (torch.tensor([2, 0, 2, 2]), "at least 1 token of each example; got 0"),
    ],
)
def test_counts_that_are_none_are_refused(kept: torch.Tensor, message: str) -> None:
    vlm = TableVLM(rugged)
    with pytest.raises(ValueError, match=message):
        GreedyForward()(vlm, batch(vlm), kept, generator())
    assert not vlm.score_calls


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GreedyForward(0), ValueError, "greedy forward needs a budget of at least 1 calls; got 0"),
        (lambda: GreedyBackward(1, "exact_match"), ValueError, "greedy backward needs .* at least 2 calls; got 1"),
        (lambda: SwapSearch(1), ValueError, "at least 2 calls; got 1"),
        (lambda: SwapSearch(group=0), ValueError, "at least 1 swap; got group=0"),
        (lambda: CrossEntropy(group=1), ValueError, "group is at least 2.*got group=1"),
        (lambda: CrossEntropy(elite=1.0), ValueError, r"elite in \(0, 1\).*elite=1"),
        (lambda: CrossEntropy(smoothing=0), ValueError, "smoothing=0"),
        (lambda: RandomSearch(reward="likelyhood"), ValueError, "likelyhood"),
        (lambda: RandomSearch(reward=AnswerProbability), TypeError, "expected a reward"),  # type: ignore[arg-type]
    ],
)
def test_options_that_make_no_sense_are_refused(make: Callable[[], Search], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("kind", ALL)
def test_rewards_that_are_not_finite_or_of_another_shape_are_refused(kind: type[Search]) -> None:
    vlm = TableVLM(rugged)

    def run(reward: Any) -> None:
        kind(200, reward)(vlm, batch(vlm), torch.full((4,), 2), generator())

    with pytest.raises(ValueError, match="is not finite for"):
        run(lambda scores, full: scores.log_likelihood / 0)
    with pytest.raises(ValueError, match=r"gave shape \(\d+,\), expected \(\d+, \d+\)"):
        run(lambda scores, full: scores.log_likelihood.mean(1))


# -- a real model ----------------------------------------------------------------------------------------


def test_searches_agree_with_tables_of_a_real_model(random_vlm: HuggingFaceVLM, scene_examples: list[Example]) -> None:
    vlm = BlockVLM(random_vlm, 2, 3)
    encoded = vlm.encode(scene_examples[:3])
    kept = torch.tensor([3, 2, 3])
    exact, forward, swapped = (
        search.search(vlm, encoded, kept, generator())
        for search in (ExactEnumeration(), GreedyForward(), SwapSearch(300, start=random_tokens))
    )
    for row in range(3):
        tables = [RewardTable.enumerate(vlm, encoded[[row]], k, NAMED) for k in range(int(kept[row]) + 1)]
        table = tables[-1]
        assert table.optimality_gap(exact.selection[row].numpy()) < 1e-4  # rounding of other batches
        assert table.reward(forward.selection[row].numpy()) == pytest.approx(table.reward(greedy(tables)), abs=1e-4)
        own = table.rows(swapped.selection[[row]].numpy())
        assert table.rewards[best_swaps(table)[own]] == pytest.approx(table.rewards[own], abs=1e-4)
    assert swapped.stopped == ("local optimum",) * 3


def test_answers_that_were_not_encoded_are_missed_at_once(
    random_vlm: HuggingFaceVLM, scene_examples: list[Example]
) -> None:
    encoded = random_vlm.encode(scene_examples[:2], with_answers=False)
    with pytest.raises(ValueError, match="a search uses the answer, and example 0 of the batch has none"):
        GreedyForward()(random_vlm, encoded, torch.tensor([2, 2]), generator())
