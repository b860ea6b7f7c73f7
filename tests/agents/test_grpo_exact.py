"""GRPO's gradients against exact ones: all groups of all subsets are enumerated, nothing is sampled.

The policy is a plain parameter vector over 4 tokens of which 2 are kept; a table says what each of the 6 subsets earns.
What the code computes for a group of G subsets is weighted by how likely the policy draws that group, for each of the
6 ** G groups, and summed: its expectation, up to rounding in float64. It is compared with the gradient of the expected
reward, computed without the distribution under test.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from agents.grpo import GRPO, GRPOConfig, Objective, advantages, policy_objective
from agents.learning import Learner
from agents.pool import ExamplePool
from agents.scorer import Scorer, ScorerConfig
from agents.subset import KSubset
from agents.training.value_baseline import ValueBaseline
from grip_env.vlms.base import Encoded, Scores
from tests.fakes import WIDTH, FakeTask, FakeVLM

N, K = 4, 2
SUBSETS = torch.tensor([[i in chosen for i in range(N)] for chosen in itertools.combinations(range(N), K)])  # (6, N)
THETA = torch.tensor([0.7, -0.4, 0.1, -1.1], dtype=torch.float64)
OLD = torch.tensor([0.2, 0.3, -0.5, -0.6], dtype=torch.float64)  # where the subsets of a second epoch were drawn
REWARDS = torch.tensor([0.3, -1.7, 0.0, 2.4, -0.2, 0.9], dtype=torch.float64)  # of the 6 subsets
UNCLIPPED = {"clip_low": math.inf, "clip_high": math.inf}


def log_probs(theta: Tensor) -> Tensor:
    """Of the 6 subsets, by enumeration: independent of the distribution that the code uses."""
    return (SUBSETS * theta).sum(1).log_softmax(0)


def true_gradient(theta: Tensor, rewards: Tensor = REWARDS) -> Tensor:
    """Of the expected reward."""
    theta = theta.clone().requires_grad_()
    (log_probs(theta).exp() * rewards).sum().backward()
    assert theta.grad is not None
    return theta.grad


def expected_gradient(
    group: int,
    settings: Objective,
    value: float | None = None,
    rewards: Tensor = REWARDS,
    drawn_at: Tensor = THETA,
) -> Tensor:
    """Of what the code maximises, over all groups of subsets that the policy with scores ``drawn_at`` may draw."""
    index = torch.cartesian_prod(*[torch.arange(6)] * group).reshape(-1, group)  # (6 ** G, G): the B axis
    likely = log_probs(drawn_at).exp()[index].prod(1)  # (B,)
    torch.testing.assert_close(likely.sum(), torch.tensor(1.0, dtype=torch.float64))
    values = None if value is None else torch.full((len(index),), value, dtype=torch.float64)
    advantage = advantages(rewards[index], settings.scale, settings.std_floor, settings.baseline, values)
    weighted = (advantage * (likely * len(index))[:, None]).T  # the mean over B becomes the expectation
    theta = THETA.clone().requires_grad_()
    subsets = SUBSETS[index].transpose(0, 1)  # (G, B, N)
    policy = KSubset(theta.expand(len(index), N), K)
    old = KSubset(drawn_at.expand(len(index), N), K).log_prob(subsets)
    policy_objective(policy, policy.log_prob(subsets), old, weighted, settings).backward()
    assert theta.grad is not None
    return theta.grad


def angle(one: Tensor, other: Tensor) -> float:
    """In degrees."""
    return math.degrees(math.acos(min(1.0, float(torch.cosine_similarity(one, other, 0)))))


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


# -- baselines -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [2, 3, 4])
def test_leave_one_out_is_unbiased(group: int) -> None:
    close(expected_gradient(group, Objective(baseline="leave_one_out", scale="none")), true_gradient(THETA))


@pytest.mark.parametrize("group", [2, 3, 4])
def test_group_mean_shrinks_the_gradient_by_the_known_factor_and_no_more(group: int) -> None:
    expected = expected_gradient(group, Objective(baseline="group_mean", scale="none"))
    close(expected, (group - 1) / group * true_gradient(THETA))
    close(expected * group / (group - 1), true_gradient(THETA))


@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("value", [0.0, -5.0, 123.0])
def test_learned_baseline_is_unbiased_however_wrong_it_is(group: int, value: float) -> None:
    close(expected_gradient(group, Objective(baseline="learned", scale="none"), value), true_gradient(THETA))


def test_baselines_differ_in_variance_and_not_in_expectation() -> None:
    """The sum over groups of likelihood times squared gradient is least near the mean reward."""
    likely = log_probs(THETA).exp()
    score = torch.stack(
        [SUBSETS[i].double() - likely @ SUBSETS.double() for i in range(6)]
    )  # gradients of log-likelihoods
    close((likely[:, None] * REWARDS[:, None] * score).sum(0), true_gradient(THETA))
    spread = []
    for value in (float(likely @ REWARDS), 10.0):
        advantage = advantages(REWARDS[:, None], "none", baseline="learned", value=torch.full((6,), value).double())
        spread.append(float((likely[:, None] * (advantage * score).square()).sum()))
    assert spread[0] < 0.1 * spread[1]


def test_constant_added_to_rewards_changes_no_gradient_with_a_groups_baseline() -> None:
    for baseline in ("group_mean", "leave_one_out"):
        for scale in ("group", "none"):
            settings = Objective(baseline=baseline, scale=scale)  # type: ignore[arg-type]
            close(expected_gradient(2, settings, rewards=REWARDS + 40), expected_gradient(2, settings))


# -- scaling ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [2, 3])
def test_dividing_by_the_groups_deviation_turns_the_gradient(group: int) -> None:
    """Groups with one outlier are turned down against those without: nothing is sampled, so no error excuses it."""
    rewards = torch.tensor([0.3, -1.7, 0.0, 24.0, -0.2, 0.9], dtype=torch.float64)

    def off(scale: Any, floor: float = 0.1) -> float:
        settings = Objective(scale=scale, std_floor=floor)
        return angle(expected_gradient(group, settings, rewards=rewards), true_gradient(THETA, rewards))

    assert off("none") < 1e-4
    assert off("group", 1e-4) > 25
    # a higher floor comes nearer to the true direction, and an endless one reaches it
    assert off("group", 1e-4) > off("group", 1.0) + 1 > off("group", 10.0) + 2
    assert off("group", 1e6) < 1e-3


def test_dividing_by_the_groups_deviation_forgets_how_much_is_at_stake() -> None:
    """An example whose rewards are a hundredth of another's weighs as much, up to the floor."""
    bare, floored = Objective(std_floor=1e-15), Objective(std_floor=0.1)
    close(expected_gradient(2, bare, rewards=REWARDS / 100), expected_gradient(2, bare))
    share = expected_gradient(2, floored, rewards=REWARDS / 100).norm() / expected_gradient(2, floored).norm()
    assert 0.05 < float(share) < 0.15
    unscaled = Objective(scale="none")
    close(expected_gradient(2, unscaled, rewards=REWARDS / 100), expected_gradient(2, unscaled) / 100)


def test_scaling_by_the_batch_weighs_examples_by_what_is_at_stake() -> None:
    rewards = torch.stack([REWARDS, REWARDS / 100])
    scaled = advantages(rewards, "batch", 0.0)
    close(scaled[1] * 100, scaled[0])
    close(scaled.square().mean(), torch.tensor(1.0, dtype=torch.float64))


def test_leave_one_out_and_mean_are_the_same_once_scaled_without_a_floor() -> None:
    close(advantages(REWARDS[None], "group", 0.0, "leave_one_out"), advantages(REWARDS[None], "group", 0.0))


# -- the ratio -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("baseline", "group", "factor"), [("leave_one_out", 2, 1.0), ("group_mean", 3, None)])
def test_second_epoch_corrects_for_who_drew_the_subsets(baseline: Any, group: int, factor: float | None) -> None:
    """Unclipped, subsets drawn by the old policy give the gradient at the new one."""
    settings = Objective(baseline=baseline, scale="none", **UNCLIPPED)
    expected = expected_gradient(group, settings, drawn_at=OLD)
    assert angle(true_gradient(OLD), true_gradient(THETA)) > 5
    if factor:
        close(expected, factor * true_gradient(THETA))
    else:  # E[rho_g (r_g - mean r)] splits into the own share of the mean and that of the others, drawn by the old
        weighted = true_gradient(THETA, REWARDS - float(log_probs(OLD).exp() @ REWARDS))
        close(expected, (group - 1) / group * weighted)


def gradients(settings: Objective, advantage: Tensor) -> Tensor:
    """Of the objective for each of the 6 subsets alone, (6, N)."""
    rows = []
    for row in range(6):
        theta = THETA.clone().requires_grad_()
        policy, chosen = KSubset(theta[None], K), SUBSETS[row][None, None]
        old = KSubset(OLD[None], K).log_prob(chosen)
        policy_objective(policy, policy.log_prob(chosen), old, advantage[row].reshape(1, 1), settings).backward()
        assert theta.grad is not None
        rows.append(theta.grad)
    return torch.stack(rows)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_clipping_stops_what_has_gone_far_enough_exactly_and_touches_nothing_else(sign: float) -> None:
    ratio = (log_probs(THETA) - log_probs(OLD)).exp()
    low, high = 0.2, 0.28
    advantage = torch.full((6,), 1.5 * sign, dtype=torch.float64)
    stopped = ratio > 1 + high if sign > 0 else ratio < 1 - low
    assert 0 < int(stopped.sum()) < 6
    outside = (ratio > 1 + high) | (ratio < 1 - low)
    assert int((outside & ~stopped).sum()) > 0  # those that went astray are still called back
    found = gradients(Objective(clip_low=low, clip_high=high), advantage)
    score = SUBSETS.double() - log_probs(THETA).exp() @ SUBSETS.double()
    for row in range(6):
        if stopped[row]:
            assert (found[row] == 0).all()
        else:
            close(found[row], ratio[row] * advantage[row] * score[row])


def test_clip_bounds_are_not_taken_for_each_other() -> None:
    ratio = (log_probs(THETA) - log_probs(OLD)).exp()
    for low, high in ((0.9, 0.01), (0.01, 5.0)):
        for sign in (1.0, -1.0):
            found = gradients(Objective(clip_low=low, clip_high=high), torch.full((6,), sign).double())
            stopped = ratio > 1 + high if sign > 0 else ratio < 1 - low
            assert ((found == 0).all(1) == stopped).all()


def test_first_epoch_has_value_0_and_a_gradient_all_the_same() -> None:
    index = torch.tensor([[0, 3], [1, 3]])
    theta = THETA.clone().requires_grad_()
    policy, subsets = KSubset(theta.expand(2, N), K), SUBSETS[index].transpose(0, 1)
    log_prob = policy.log_prob(subsets)
    objective = policy_objective(policy, log_prob, log_prob.detach(), advantages(REWARDS[index]).T, Objective())
    objective.backward()
    assert abs(float(objective.detach())) < 1e-12
    assert theta.grad is not None
    assert float(theta.grad.norm()) > 0.1


# -- KL, entropy, groups that teach nothing --------------------------------------------------------------


def extras(settings: Objective, counted: Tensor | None = None, advantage: Tensor | None = None) -> Tensor:
    theta = THETA.clone().requires_grad_()
    policy, reference = (KSubset(scores.expand(3, N), K) for scores in (theta, OLD))
    subsets = SUBSETS.reshape(2, 3, N)  # (G, B, N)
    log_prob = policy.log_prob(subsets)
    advantage = torch.zeros_like(log_prob).detach() if advantage is None else advantage
    policy_objective(policy, log_prob, log_prob.detach(), advantage, settings, counted, reference).backward()
    assert theta.grad is not None
    return theta.grad


def test_kl_gradient_is_exact_and_points_from_the_policy_to_the_reference() -> None:
    theta = THETA.clone().requires_grad_()
    log_p, log_q = log_probs(theta), log_probs(OLD)
    (-0.7 * (log_p.exp() * (log_p - log_q)).sum()).backward()
    assert theta.grad is not None
    close(extras(Objective(kl_weight=0.7)), theta.grad)
    assert not extras(Objective()).any()


def test_entropy_gradient_is_exact_per_kept_token() -> None:
    theta = THETA.clone().requires_grad_()
    log_p = log_probs(theta)
    (0.3 * -(log_p.exp() * log_p).sum() / K).backward()
    assert theta.grad is not None
    close(extras(Objective(entropy_weight=0.3)), theta.grad)


def test_dropped_groups_count_neither_above_nor_below_the_line() -> None:
    advantage = torch.tensor([[1.0, -2.0, 0.5], [-1.0, 2.0, -0.5]], dtype=torch.float64)
    every = torch.ones(3, dtype=torch.bool)
    close(extras(Objective(), every, advantage), extras(Objective(), None, advantage))
    middle = torch.tensor([False, True, False])
    alone = torch.tensor([[0.0, -6.0, 0.0], [0.0, 6.0, 0.0]], dtype=torch.float64)  # three times, of three
    close(extras(Objective(), middle, advantage), extras(Objective(), None, alone))


def test_where_no_group_teaches_only_kl_and_entropy_act() -> None:
    advantage = torch.ones(2, 3, dtype=torch.float64)
    nothing = torch.zeros(3, dtype=torch.bool)
    assert not extras(Objective(), nothing, advantage).any()
    close(extras(Objective(kl_weight=0.7), nothing, advantage), extras(Objective(kl_weight=0.7)))


# -- the loop puts the pieces together as it says --------------------------------------------------------


class SpiedVLM(FakeVLM):
    """Remembers what it was asked to score for whole groups."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Encoded, Tensor, Tensor]] = []

    def score(self, encoded: Encoded, selection: Tensor, *args: Any, **kwargs: Any) -> Scores:
        scores = super().score(encoded, selection, *args, **kwargs)
        if selection.shape[1] > 1:
            self.seen.append((encoded, selection, scores.log_likelihood))
        return scores


def by_hand(preset: str, rewards: Tensor, log_prob: Tensor, old: Tensor, value: Tensor, kl: Tensor) -> Tensor:
    """What each preset's paper maximises, for one action without length; rewards and log-probabilities are (B, G)."""
    group = rewards.shape[1]
    mean, deviation = rewards.mean(1, keepdim=True), rewards.std(1, unbiased=False, keepdim=True)
    advantage = {
        "default": (rewards - mean) / ((rewards - mean).square().mean().sqrt() + 0.1),
        "grpo": (rewards - mean) / (deviation + 1e-4),
        "dr-grpo": rewards - mean,
        "dapo": (rewards - mean) / (deviation + 1e-4),
        "rloo": rewards - (rewards.sum(1, keepdim=True) - rewards) / (group - 1),
        "reinforce": rewards - value[:, None],
    }[preset]
    ratio = (log_prob - old).exp()
    bounded = ratio.clamp(0.8, 1.28 if preset in ("default", "dapo") else 1.2)
    each = torch.min(ratio * advantage, bounded * advantage)
    kept = rewards.std(1) >= 0.01 if preset == "dapo" else torch.ones(len(rewards), dtype=torch.bool)
    assert (0 < int(kept.sum()) < len(kept)) == (preset == "dapo")
    return each[kept].mean() - (0.04 * kl.mean() if preset == "grpo" else 0)


@pytest.mark.parametrize("preset", ["default", "grpo", "dr-grpo", "dapo", "rloo", "reinforce"])
def test_loop_climbs_the_gradient_its_preset_promises(preset: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In both epochs of the second step, when the policy has left the warm-up's."""
    vlm = SpiedVLM()
    torch.manual_seed(0)
    options: dict[str, Any] = {"steps": 2, "warmup_steps": 2, "instances": 12, "candidates": 1, "group": 3, "pool": 16}
    rates = {"learning_rate": 0.02, "warmup_learning_rate": 0.01}
    options |= {"budget_tilt": 1.0, "reuse": 1}
    config = GRPOConfig(preset=preset, epochs=2, min_budget=0.06, teacher="relevance", **rates, **options)
    scorer = Scorer(ScorerConfig(token_width=WIDTH, width=32, blocks=1, heads=2))
    algorithm = GRPO(vlm, ExamplePool(vlm, FakeTask(40), size=16, reuse=1), scorer, config)
    found: list[Tensor] = []
    scorers: list[Scorer] = []
    values: list[Tensor] = []
    minimise, predict = Learner.minimise, ValueBaseline.predict

    def spy(self: Learner, loss: Tensor) -> float:
        if self.network is scorer:
            parts = torch.autograd.grad(-loss, list(scorer.parameters()), retain_graph=True, allow_unused=True)
            found.append(torch.cat([part.flatten() for part in parts if part is not None]))
            scorers.append(copy.deepcopy(scorer))
        return minimise(self, loss)

    def remember(self: ValueBaseline, encoded: Encoded, kept: Tensor) -> Tensor:
        values.append(predict(self, encoded, kept))
        return values[-1]

    monkeypatch.setattr(Learner, "minimise", spy)
    monkeypatch.setattr(ValueBaseline, "predict", remember)
    assert [m.phase for m in algorithm.train()] == ["warmup", "warmup", "grpo", "grpo"]
    assert len(found) == 2 + 2 + 2
    warm, (first, second) = scorers[2], scorers[4:]  # each as it was before its update
    encoded, selection, likelihood = vlm.seen[1]
    kept, subsets = selection[:, 0].sum(1), selection.transpose(0, 1)
    rewards = likelihood - vlm.log_likelihood(encoded, encoded.full_selection())
    reference = KSubset(warm.score(encoded, kept).detach(), kept)
    old = KSubset(first.score(encoded, kept), kept).log_prob(subsets).T.detach()
    value = values[1] if values else torch.zeros(len(encoded))
    for current, gradient in ((first, found[4]), (second, found[5])):
        policy = KSubset(current.score(encoded, kept), kept)
        log_prob, kl = policy.log_prob(subsets).T, torch.distributions.kl_divergence(policy, reference)
        objective = by_hand(preset, rewards, log_prob, old, value, kl)
        parts = torch.autograd.grad(objective, list(current.parameters()), allow_unused=True)
        expected = torch.cat([part.flatten() for part in parts if part is not None])
        assert float(expected.norm()) > 1e-3
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)
    assert float((log_prob - old).detach().abs().max()) > 0.3  # far enough for clipping to act
