"""Tokens chosen one after another: the law against enumeration and slow loops, gradients, scorers and GRPO with it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from agents.base import observations, top_k
from agents.grpo import GRPO, GRPOConfig, Objective, advantages, policy_objective
from agents.ordered_subset import LARGE, OrderedSubset, as_subsets
from agents.pool import ExamplePool
from agents.scorer import Scorer, ScorerConfig
from agents.selectors import ScorerPolicy, ScorerSelector
from grip_env.vlms.base import Encoded, Scores
from tests.agents.batches import encode
from tests.fakes import WIDTH, FakeTask, FakeVLM

SMALL = ScorerConfig(token_width=WIDTH, width=32, blocks=1, heads=2, in_turn=True)


def law(seed: int = 0, tokens: int = 5, k: tuple[int, ...] = (2, 3), padded: bool = True) -> OrderedSubset:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(len(k), tokens, generator=generator, dtype=torch.float64)
    interaction = torch.randn(len(k), tokens, tokens, generator=generator, dtype=torch.float64)
    mask = torch.ones(len(k), tokens, dtype=torch.bool)
    if padded:
        mask[0, -1] = False
    return OrderedSubset(scores, interaction, torch.tensor(k), mask)


def slow_log_prob(policy: OrderedSubset, row: int, order: tuple[int, ...]) -> float:
    """Choice by choice, in plain Python."""
    left = set(policy.mask[row].nonzero().flatten().tolist())
    logits = policy.scores[row].tolist()
    total = 0.0
    for choice in order:
        total += logits[choice] - math.log(sum(math.exp(logits[token]) for token in left))
        left.remove(choice)
        logits = [value - float(policy.interaction[row, i, choice]) for i, value in enumerate(logits)]
    return total


def every_order(policy: OrderedSubset, row: int) -> list[tuple[int, ...]]:
    real = policy.mask[row].nonzero().flatten().tolist()
    return list(itertools.permutations(real, int(policy.k[row])))


def padded_orders(policy: OrderedSubset, row: int, orders: list[tuple[int, ...]]) -> torch.Tensor:
    """As the law takes them, long (G, B, K); the other rows get any order of theirs."""
    whole = policy.order.expand(len(orders), -1, -1).clone()
    whole[:, row] = -1
    whole[:, row, : len(orders[0])] = torch.tensor(orders)
    return whole


@pytest.mark.parametrize("row", [0, 1])
def test_log_probabilities_are_those_of_the_definition_and_sum_to_1(row: int) -> None:
    policy = law()
    orders = every_order(policy, row)
    found = policy.log_prob(padded_orders(policy, row, orders))[:, row]
    slow = torch.tensor([slow_log_prob(policy, row, order) for order in orders], dtype=torch.float64)
    torch.testing.assert_close(found, slow)
    assert float(found.exp().sum()) == pytest.approx(1.0)


def test_draws_are_as_frequent_as_their_probabilities_say() -> None:
    policy = law(seed=3)
    draws = policy.sample((30_000,), generator=torch.Generator().manual_seed(0))
    assert draws.shape == (30_000, 2, 3)
    assert (draws[:, 0, 2] == -1).all()  # the first row chooses two
    for row in range(2):
        orders = every_order(policy, row)
        counts = dict.fromkeys(orders, 0)
        for drawn in draws[:, row, : len(orders[0])].tolist():
            counts[tuple(drawn)] += 1
        for order, count in counts.items():
            likely = math.exp(slow_log_prob(policy, row, order))
            assert abs(count / 30_000 - likely) < 5 * math.sqrt(likely * (1 - likely) / 30_000) + 1e-4, order


def test_each_turn_draws_a_number_for_every_row_whether_it_is_done_or_not() -> None:
    """So that the draws of a seed are what they were when all rows went through every turn."""
    policy = law(tokens=7, k=(2, 6, 1, 4), padded=False)
    drawn = policy.sample((3,), generator=torch.Generator().manual_seed(5))
    numbers = torch.Generator().manual_seed(5)
    luck = [torch.rand((3, 4, 1), generator=numbers) for _ in range(6)]  # (turn, draw, row)
    for draw, row in itertools.product(range(3), range(4)):
        logits, left, order = policy.scores[row].clone(), torch.ones(7, dtype=torch.bool), []
        for turn in range(int(policy.k[row])):
            shares = logits.masked_fill(~left, -torch.inf).softmax(-1).cumsum(-1)
            order.append(int((shares <= luck[turn][draw, row] * shares[-1]).sum()))
            left[order[-1]] = False
            logits = logits - policy.interaction[row, :, order[-1]]
        assert drawn[draw, row].tolist() == order + [-1] * (6 - len(order))


def test_mode_takes_the_best_that_is_left_each_time() -> None:
    policy = law(seed=5)
    for row in range(2):
        left = policy.mask[row].clone()
        logits = policy.scores[row].clone()
        for turn in range(int(policy.k[row])):
            choice = int(logits.masked_fill(~left, -math.inf).argmax())
            assert int(policy.order[row, turn]) == choice
            left[choice] = False
            logits -= policy.interaction[row, :, choice]
        assert policy.mode[row].equal(policy.mask[row] & ~left)


def test_without_interaction_the_mode_is_the_best_scores_and_ties_go_to_the_lower_index() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    kept, mask = torch.tensor([2, 3]), torch.ones(2, 4, dtype=torch.bool)
    policy = OrderedSubset(scores, torch.zeros(2, 4, 4), kept, mask)
    assert policy.mode.equal(top_k(scores, kept, mask))


def test_orders_become_sets() -> None:
    orders = torch.tensor([[[2, 0, -1], [1, 3, 2]]])
    assert as_subsets(orders, 4).int().tolist() == [[[1, 0, 1, 0], [0, 1, 1, 1]]]


def test_rows_do_not_depend_on_what_they_are_batched_with_nor_on_padding() -> None:
    policy = law(k=(2, 4, 1))
    size = [4, 5, 5]  # the first row has padding
    alone = [
        OrderedSubset(
            policy.scores[[row], :tokens],
            policy.interaction[[row], :tokens, :tokens],
            policy.k[[row]],
            policy.mask[[row], :tokens],
        )
        for row, tokens in enumerate(size)
    ]
    orders = policy.sample((7,), generator=torch.Generator().manual_seed(1))
    for row, (one, tokens) in enumerate(zip(alone, size, strict=True)):
        own = orders[:, [row], : int(policy.k[row])]
        torch.testing.assert_close(policy.log_prob(orders)[:, row], one.log_prob(own)[:, 0])
        assert policy.mode[row, :tokens].equal(one.mode[0])


def test_large_rows_are_computed_again_for_their_gradient_which_is_the_same() -> None:
    tokens = 300
    assert 250 * tokens > LARGE
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(1, tokens, generator=generator), torch.randn(1, tokens, tokens, generator=generator)]
    gradients = []
    for limit in (LARGE, math.inf):
        scores, interaction = (part.clone().requires_grad_() for part in parts)
        policy = OrderedSubset(scores, interaction, torch.tensor([250]), torch.ones(1, tokens, dtype=torch.bool))
        orders = policy.sample((2,), generator=torch.Generator().manual_seed(0))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("agents.ordered_subset.LARGE", limit)
            policy.log_prob(orders).sum().backward()
        gradients.append((scores.grad, interaction.grad))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("k", [0, 5])
def test_impossible_counts_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k must be from 1 .* got k = \[{k}\] of \[4\] tokens"):
        OrderedSubset(torch.zeros(1, 4), torch.zeros(1, 4, 4), torch.tensor([k]), torch.ones(1, 4, dtype=torch.bool))


def test_leave_one_out_gradients_are_unbiased_over_all_groups_of_two() -> None:
    """As in test_grpo_exact: every group of two orders, weighted by its probability, against the true gradient."""
    generator = torch.Generator().manual_seed(4)
    scores = torch.randn(3, generator=generator, dtype=torch.float64)
    interaction = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    orders = torch.tensor(list(itertools.permutations(range(3), 2)))  # (6, 2)
    rewards = torch.tensor([0.3, -1.7, 0.3, 2.4, -1.7, 2.4], dtype=torch.float64)  # of sets: 01, 02, 01, 12, 02, 12

    def policy(theta: torch.Tensor, pairs: torch.Tensor, rows: int) -> OrderedSubset:
        mask = torch.ones(rows, 3, dtype=torch.bool)
        return OrderedSubset(theta.expand(rows, 3), pairs.expand(rows, 3, 3), torch.full((rows,), 2), mask)

    true_theta, true_pairs = scores.clone().requires_grad_(), interaction.clone().requires_grad_()
    every = policy(true_theta, true_pairs, 6).log_prob(orders[None])[0]  # order b in row b
    (every.exp() * rewards).sum().backward()

    index = torch.cartesian_prod(torch.arange(6), torch.arange(6))  # (36, G = 2)
    likely = every.detach().exp()[index].prod(1)
    settings = Objective(baseline="leave_one_out", scale="none", clip_low=math.inf, clip_high=math.inf)
    advantage = advantages(rewards[index], "none", baseline="leave_one_out")
    theta, pairs = scores.clone().requires_grad_(), interaction.clone().requires_grad_()
    law = policy(theta, pairs, 36)
    log_prob = law.log_prob(orders[index].transpose(0, 1))
    policy_objective(law, log_prob, log_prob.detach(), (advantage * (likely * 36)[:, None]).T, settings).backward()
    torch.testing.assert_close(theta.grad, true_theta.grad)
    torch.testing.assert_close(pairs.grad, true_pairs.grad)


# -- scorers that choose in turn ---------------------------------------------------------------------------


def random_scorer() -> Scorer:
    torch.manual_seed(0)
    scorer = Scorer(SMALL).eval()
    torch.nn.init.normal_(scorer.out[1].weight)
    torch.nn.init.normal_(scorer.interaction.strength.weight)  # type: ignore[union-attr]
    return scorer


def test_shuffled_tokens_give_shuffled_choices() -> None:
    scorer, encoded = random_scorer(), encode()
    kept, order = torch.tensor([1, 2, 3, 4, 5]), torch.randperm(16, generator=torch.Generator().manual_seed(1))
    shuffled = dataclasses.replace(encoded, tokens=encoded.tokens[:, order], positions=encoded.positions[:, order])
    with torch.no_grad():
        policy, moved = scorer.policy(encoded, kept), scorer.policy(shuffled, kept)
    assert isinstance(policy, OrderedSubset)
    assert isinstance(moved, OrderedSubset)
    torch.testing.assert_close(moved.interaction, policy.interaction[:, order][:, :, order], atol=1e-5, rtol=1e-4)
    assert moved.mode.equal(policy.mode[:, order])


def test_what_pads_a_batch_is_never_chosen_and_changes_no_choice() -> None:
    scorer, encoded = random_scorer(), encode(padded=True)
    kept = torch.tensor([4, 4, 3, 2, 2])
    chosen = ScorerSelector(scorer)(FakeVLM(), encoded, kept, torch.Generator())
    assert chosen.sum(1).tolist() == kept.tolist()
    assert not (chosen & ~encoded.token_mask).any()
    for row, count in enumerate(encoded.token_mask.sum(1).tolist()):
        alone = encoded[[row]]
        for name in ("tokens", "token_mask", "positions"):
            setattr(alone, name, getattr(alone, name)[:, :count])
        assert ScorerSelector(scorer)(FakeVLM(), alone, kept[[row]], torch.Generator())[0].equal(chosen[row, :count])


def test_choices_do_not_depend_on_how_many_rows_are_looked_at_together(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, encoded = random_scorer(), encode(padded=True)
    kept = torch.tensor([4, 4, 3, 2, 2])
    chosen = ScorerSelector(scorer)(FakeVLM(), encoded, kept, torch.Generator())
    for most in (1, 2 * 16 * 16):
        monkeypatch.setattr("agents.selectors.MOST_PAIRS", most)
        assert ScorerSelector(scorer)(FakeVLM(), encoded, kept, torch.Generator()).equal(chosen)


def test_policy_on_observations_chooses_what_the_selector_does() -> None:
    scorer, encoded = random_scorer(), encode(padded=True)
    kept = torch.tensor([4, 4, 3, 2, 2])
    chosen = ScorerSelector(scorer)(FakeVLM(), encoded, kept, torch.Generator())
    for row, observation in enumerate(observations(encoded, kept)):
        assert ScorerPolicy(scorer).select(observation).tolist() == chosen[row].tolist()


def test_untrained_interaction_takes_2_on_the_spot_and_less_further_away() -> None:
    interaction = Scorer(SMALL).interaction
    assert interaction is not None
    positions = encode(1).positions
    with torch.no_grad():
        takes = interaction(torch.zeros(1, 16, SMALL.width), positions)[0]
    assert float(takes[0, 0]) == pytest.approx(2)
    distances = torch.cdist(positions[0], positions[0])
    assert (takes[distances < 0.3] > takes[distances > 0.4].max()).all()


def test_of_two_near_tokens_with_the_best_scores_one_is_chosen_and_then_one_far_away() -> None:
    scorer = Scorer(SMALL)
    assert scorer.interaction is not None
    positions = encode(1).positions
    with torch.no_grad():
        takes = scorer.interaction(torch.zeros(1, 16, SMALL.width), positions)
    scores = torch.zeros(1, 16)
    scores[0, :3] = torch.tensor([3.0, 2.9, 0.0])  # neighbours in the first row of the grid
    scores[0, 15] = 2.7  # the opposite corner
    mask = torch.ones(1, 16, dtype=torch.bool)
    assert OrderedSubset(scores, takes, torch.tensor([2]), mask).order.tolist() == [[0, 15]]
    assert OrderedSubset(scores, 0 * takes, torch.tensor([2]), mask).order.tolist() == [[0, 1]]


def test_how_much_a_token_loses_is_its_own_and_grows_with_likeness() -> None:
    """Entry [i, j] is what i loses when j is chosen: with the strength of i, and more where j is what i asks for."""
    interaction = Scorer(SMALL).interaction
    assert interaction is not None
    features = torch.zeros(1, 3, SMALL.width)
    features[0, 0, 0] = features[0, 1, 1] = features[0, 2, 2] = 1.0
    positions = torch.zeros(1, 3, 2)
    with torch.no_grad():
        interaction.strength.weight[0, 0] = 3.0  # token 0 loses more than the others
        interaction.pair.weight.zero_()
        interaction.pair.weight[0, 0] = 8.0  # what token 0 asks for ...
        interaction.pair.weight[16, 1] = 8.0  # ... token 1 is
        takes = interaction(features, positions)[0]
    assert takes[0, 2] > 2 * takes[2, 0]  # the strength is that of the one that loses
    assert takes[0, 1] > 1.9 * takes[0, 2]  # alike: 2 rather than 1
    assert float(takes[2, 1]) == pytest.approx(float(takes[2, 0]))  # token 2 asks for nothing


def test_temperature_divides_scores_and_what_choices_take() -> None:
    scorer, encoded = random_scorer(), encode()
    kept = torch.full((5,), 4)
    with torch.no_grad():
        one, hot = scorer.policy(encoded, kept), scorer.policy(encoded, kept, temperature=4.0)
    assert isinstance(one, OrderedSubset)
    assert isinstance(hot, OrderedSubset)
    torch.testing.assert_close(hot.scores, one.scores / 4)
    torch.testing.assert_close(hot.interaction, one.interaction / 4)
    assert hot.mode.equal(one.mode)


def test_scorer_that_chooses_in_turn_is_saved_as_such(tmp_path: Path) -> None:
    scorer, encoded = random_scorer(), encode()
    scorer.save(tmp_path)
    loaded = Scorer.load(tmp_path)
    assert loaded.config.in_turn
    kept = torch.full((5,), 4)
    assert loaded.policy(encoded, kept).mode.equal(scorer.policy(encoded, kept).mode)


# -- GRPO with it --------------------------------------------------------------------------------------------


class Pairs(FakeVLM):
    """Pays for keeping two tokens that are far from each other: one from the upper half and one from the lower."""

    def log_likelihood(
        self, encoded: Encoded, selection: torch.Tensor, tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        upper = (encoded.positions[..., 0] < 0.5)[:, None]
        both = (selection & upper).any(-1) & (selection & ~upper).any(-1)
        return both.float() - 1


def trained(in_turn: bool) -> float:
    """Return what a policy gains of 2 tokens, drawn from it, after learning without a warm-up; 0 is the best."""
    vlm: Any = Pairs()
    torch.manual_seed(0)
    options: dict[str, Any] = {"instances": 16, "group": 8, "candidates": 1, "pool": 32, "learning_rate": 3e-3}
    config = GRPOConfig(steps=120, warmup_steps=0, min_budget=2 / 16, max_budget=2 / 16, **options)
    scorer = Scorer(dataclasses.replace(SMALL, in_turn=in_turn))
    last: list[float] = []
    for metrics in GRPO(vlm, ExamplePool(vlm, FakeTask(40), size=32), scorer, config).train():
        last.append(metrics.values["log_likelihood"])
        assert all(math.isfinite(value) for value in metrics.values.values())
    return sum(last[-10:]) / 10


def test_grpo_learns_in_turn_what_scores_alone_cannot_say() -> None:
    """Half of all pairs pay. Scores alone could favour one upper and one lower token only if they knew them apart."""
    assert trained(in_turn=True) > -0.2
    assert trained(in_turn=False) < -0.3


@pytest.mark.parametrize("settings", [{"kl_weight": 0.1}, {"entropy_weight": 0.1}])
def test_what_needs_a_known_entropy_is_refused(settings: dict[str, float]) -> None:
    vlm: Any = FakeVLM()
    pool = ExamplePool(vlm, FakeTask(40), size=16)
    with pytest.raises(ValueError, match="set both to 0, or choose all at once"):
        GRPO(vlm, pool, Scorer(SMALL), GRPOConfig(instances=4, **settings))  # type: ignore[arg-type]


def test_scorer_and_options_must_agree_and_the_scorer_decides_where_none_is_given() -> None:
    vlm: Any = FakeVLM()
    pool = ExamplePool(vlm, FakeTask(40), size=16)
    with pytest.raises(ValueError, match="in_turn=False, and the scorer was made with in_turn=True"):
        GRPO(vlm, pool, Scorer(SMALL), GRPOConfig(instances=4, in_turn=False))
    with pytest.raises(ValueError, match="in_turn=False, and the scorer was made with in_turn=True"):
        GRPO(vlm, pool, Scorer(SMALL), GRPOConfig(instances=4, preset="dapo"))  # which chooses all at once
    for in_turn in (True, False):
        algorithm = GRPO(vlm, pool, Scorer(dataclasses.replace(SMALL, in_turn=in_turn)), GRPOConfig(instances=4))
        assert algorithm.config.in_turn is algorithm.settings.in_turn is in_turn


def test_candidates_orders_are_cut_to_the_rows_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Orders are as long as the largest subset of the candidates, which may be longer than all that are trained on."""
    vlm: Any = FakeVLM()
    options: dict[str, Any] = {"instances": 2, "candidates": 8, "probes": 2, "group": 4, "pool": 16, "warmup_steps": 0}
    algorithm = GRPO(vlm, ExamplePool(vlm, FakeTask(40), size=16), Scorer(SMALL), GRPOConfig(steps=6, **options))
    real = algorithm._score
    widths: list[int] = []

    def watched(encoded: Encoded, full: Scores, actions: torch.Tensor) -> Any:
        widths.append(actions.shape[-1])
        return real(encoded, full, actions)

    monkeypatch.setattr(algorithm, "_score", watched)
    for metrics in algorithm.train():
        assert math.isfinite(metrics.values["gradient_norm"])
    assert any(more < first for first, more in zip(widths[::2], widths[1::2], strict=True))


def test_weights_of_a_seed_are_the_same_with_an_interaction_and_without() -> None:
    weights = []
    for in_turn in (False, True):
        torch.manual_seed(3)
        weights.append(Scorer(dataclasses.replace(SMALL, in_turn=in_turn)).state_dict())
    assert weights[0].keys() < weights[1].keys()
    assert all(value.equal(weights[1][name]) for name, value in weights[0].items())


def test_gradients_are_the_same_on_several_threads_every_time() -> None:
    """Tokens chosen twice add to one place of the interaction's gradient, in an order that must not depend on luck."""
    generator = torch.Generator().manual_seed(0)
    scores, interaction = torch.randn(4, 144, generator=generator), torch.randn(4, 144, 144, generator=generator)
    mask, k = torch.ones(4, 144, dtype=torch.bool), torch.tensor([72, 50, 14, 7])
    orders = OrderedSubset(scores, interaction, k, mask).sample((8,), generator=generator)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = []
        for _ in range(10):
            leaf = interaction.clone().requires_grad_(True)
            OrderedSubset(scores, leaf, k, mask).log_prob(orders).sum().backward()
            assert leaf.grad is not None
            found.append(leaf.grad)
    finally:
        torch.set_num_threads(threads)
    assert all(gradient.equal(found[0]) for gradient in found)
