"""The set-wise policy: what it owes to symmetry, budgets and padding, whatever trains it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import MultiDiscrete
from stable_baselines3 import A2C, PPO

from agents.base import top_k
from agents.sb3.masked_policy import MaskableSetPolicy
from agents.sb3.set_policy import SequentialSelector, SetPolicy, expecting
from agents.subset import KSubset
from grip_env import as_sb3_vec_env
from grip_env.envs.selection import TokenSelectionEnv, TokenSelectionVectorEnv
from grip_env.envs.sequential import SequentialSelectionVectorEnv
from tests.fakes import FakeTask, FakeVLM

SMALL = {"width": 16, "blocks": 1, "heads": 2}
MODES = ["binary", "scores", "sequential"]


class FinerTask(FakeTask):
    """The same pictures, four times as large, so that they can be cut into 576."""

    def example(self, split: str, index: int) -> Any:
        example = super().example(split, index)
        return dataclasses.replace(example, image=example.image.repeat(4, 0).repeat(4, 1))


def make(mode: str, count: int = 4, side: int = 4, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "vlm": FakeVLM(side),
        "task": FinerTask(),
        "budget": (0.1, 0.6),
        "max_question_tokens": 8,
    }
    if mode == "sequential":
        return SequentialSelectionVectorEnv(count, **arguments | changes)
    return TokenSelectionVectorEnv(count, **arguments | {"action_mode": mode} | changes)


def make_policy(envs: Any, random: bool = True, kind: type = SetPolicy, seed: int = 0) -> Any:
    """A policy; with random weights where training starts from zero, so that tokens and values differ."""
    torch.manual_seed(seed)
    spaces = envs.single_observation_space, envs.single_action_space
    policy = kind(*spaces, lambda _: 1e-3, features_extractor_kwargs=SMALL)
    if random:
        network = policy.features_extractor.network
        torch.nn.init.normal_(network.scorer.out[1].weight)
        torch.nn.init.normal_(network.selected_in)
    return policy


def observe(envs: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    observations, _ = envs.reset(seed=seed)
    if "selected" in observations:  # some way into the episodes
        for _ in range(2):
            actions = np.array([np.flatnonzero(row)[-1] for row in envs.action_masks()])
            observations = envs.step(actions)[0]
    return {key: torch.from_numpy(value) for key, value in observations.items()}


def parameters(distribution: Any) -> torch.Tensor:
    inner = distribution.distribution
    return inner.mean if isinstance(inner, torch.distributions.Normal) else inner.logits


@pytest.mark.parametrize("mode", MODES)
def test_shuffled_tokens_give_shuffled_actions_and_the_same_value(mode: str) -> None:
    envs = make(mode)
    policy, seen = make_policy(envs), observe(envs)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    per_token = ("tokens", "token_mask", "positions", "selected")
    shuffled = {key: value[:, order] if key in per_token else value for key, value in seen.items()}
    with torch.no_grad():
        plain, other = (parameters(policy.get_distribution(each)) for each in (seen, shuffled))
        values, same = policy.predict_values(seen), policy.predict_values(shuffled)
    torch.testing.assert_close(plain[:, order], other, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(values, same, rtol=1e-4, atol=1e-4)
    assert plain.std(1).min() > 0.01
    assert values.std() > 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_number_of_weights_does_not_depend_on_the_number_of_tokens(mode: str) -> None:
    few, many = (make_policy(make(mode, 1, side)) for side in (4, 24))
    assert few.action_space.shape == (16,) or few.action_space.n == 16  # type: ignore[attr-defined]
    shapes = [{name: value.shape for name, value in policy.named_parameters()} for policy in (few, many)]
    assert shapes[0] == shapes[1]


def test_coins_have_the_expected_number_of_heads() -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (0.0, 1.0, 30.0):
        scores = scale * torch.randn(6, 40, generator=generator)
        mask = torch.rand(6, 40, generator=generator) < 0.7
        kept = torch.tensor([1, 2, 5, 9, 14, 1])
        coins = expecting(scores, kept, mask).sigmoid()
        torch.testing.assert_close(coins.sum(1), kept.float(), rtol=1e-4, atol=1e-4)
        assert not coins[~mask].any()
    full = expecting(scores, mask.sum(1), mask)
    torch.testing.assert_close(full.sigmoid().sum(1), mask.sum(1) - 0.5, rtol=1e-3, atol=1e-3)


def test_coins_that_show_k_heads_have_the_law_of_subsets() -> None:
    scores = torch.randn(1, 6, generator=torch.Generator().manual_seed(0))
    kept, mask = torch.tensor([2]), torch.ones(1, 6, dtype=torch.bool)
    law = torch.distributions.Bernoulli(logits=expecting(scores, kept, mask))
    pairs = torch.eye(6)[torch.combinations(torch.arange(6))].sum(1)  # (15, 6)
    given = law.log_prob(pairs).sum(1).softmax(0)
    exact = KSubset(scores[0], 2).log_prob(pairs.bool()).exp()
    torch.testing.assert_close(given, exact, rtol=1e-4, atol=1e-5)


def test_gradients_flow_through_the_shift() -> None:
    scores = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    mask = torch.tensor([[True] * 5, [True] * 4 + [False]])
    kept = torch.tensor([2, 3])
    assert torch.autograd.gradcheck(lambda each: expecting(each, kept, mask)[mask], scores, eps=1e-4, atol=1e-3)


def test_untrained_policy_keeps_about_the_budget() -> None:
    envs = make("binary", 64)
    seen = observe(envs)
    policy = make_policy(envs, random=False)
    with torch.no_grad():
        coins = policy.get_distribution(seen).distribution.probs
    budget = seen["budget"].expand(-1, 16)
    torch.testing.assert_close(coins, budget, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["binary", "scores"])
def test_deterministic_actions_keep_as_many_as_the_budget_allows(mode: str) -> None:
    counts = {"vlm": FakeVLM(count=lambda example: 9 + len(example.image) % 3 + int(example.key[-1]) % 4)}
    envs = make(mode, 8, max_tokens=16, **counts)
    model = PPO(SetPolicy, as_sb3_vec_env(envs), n_steps=2, batch_size=4, device="cpu")
    torch.nn.init.normal_(model.policy.features_extractor.network.scorer.out[1].weight)
    observations, _ = envs.reset(seed=3)
    actions, _ = model.predict(observations, deterministic=True)
    scores = model.policy.features_extractor(model.policy.obs_to_tensor(observations)[0]).scores.detach()
    *_, infos = envs.step(actions)
    mask = torch.from_numpy(observations["token_mask"]).bool()
    kept = torch.from_numpy(infos["final_info"]["k"])
    expected = top_k(scores, kept, mask)
    assert [np.flatnonzero(row).tolist() for row in expected.numpy()] == [
        np.flatnonzero(row).tolist() for row in infos["final_info"]["kept"]
    ]
    assert not infos["final_info"]["over_budget"].any()
    assert len(set(mask.sum(1).tolist())) > 1


@pytest.mark.parametrize("mode", MODES)
def test_padding_changes_nothing(mode: str) -> None:
    tight, loose = (make(mode, 3, max_tokens=count) for count in (16, 20))
    policies = [make_policy(envs) for envs in (tight, loose)]
    seen = [observe(envs) for envs in (tight, loose)]
    actions = torch.tensor([5, 6, 7]) if mode == "sequential" else torch.rand(3, 16).round()
    padded = actions if mode == "sequential" else torch.nn.functional.pad(actions, (0, 4), value=0.0)
    results = []
    for policy, each, action in zip(policies, seen, (actions, padded), strict=True):
        value, log_prob, _ = policy.evaluate_actions(each, action)
        # of a difference, as what is drawn for padding may add a constant
        (log_prob[0] - log_prob[1] + value.sum()).backward()
        results.append((value, log_prob[0] - log_prob[1], {n: p.grad for n, p in policy.named_parameters()}))
    for one, two in zip(*[result[:2] for result in results], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
    for name, gradient in results[0][2].items():
        torch.testing.assert_close(gradient, results[1][2][name], rtol=1e-2, atol=1e-3, msg=name)


def test_illegal_tokens_are_never_chosen_with_masks_or_without() -> None:
    envs = make("sequential", 6, max_tokens=20)
    for kind in (SetPolicy, MaskableSetPolicy):
        policy = make_policy(envs, kind=kind)
        observations, _ = envs.reset(seed=0)
        torch.manual_seed(0)
        for _ in range(30):
            legal = envs.action_masks()
            for masks in ({}, {"action_masks": legal}) if kind is MaskableSetPolicy else ({},):
                actions, _ = policy.predict(observations, **masks)
                assert legal[np.arange(6), actions].all()
            observations = envs.step(actions)[0]


def test_selected_tokens_are_seen() -> None:
    envs = make("sequential")
    policy, seen = make_policy(envs), observe(envs)
    other = seen | {"selected": torch.zeros_like(seen["selected"])}
    change = (policy.predict_values(seen) - policy.predict_values(other))[:, 0].abs()
    some = seen["selected"].bool().any(1)  # an episode may just have begun
    assert some.sum() > 1
    assert change[some].min() > 1e-5
    assert not change[~some].any()


def test_choosing_a_batch_is_choosing_token_by_token_in_the_environment() -> None:
    vlm, task = FakeVLM(), FinerTask()
    envs = make("sequential", 5, vlm=vlm, task=task)
    policy = make_policy(envs)
    indices, budgets = [0, 3, 4, 7, 9], [0.1, 0.2, 0.3, 0.6, 1.0]
    observations, _ = envs.reset(seed=0, options={"index": indices, "budget": budgets})
    encoded = vlm.encode([task.example("train", index) for index in indices])
    kept = torch.tensor([2, 3, 5, 10, 16])
    asked = len(vlm.score_calls)
    chosen = SequentialSelector(policy.features_extractor.network)(vlm, encoded, kept, torch.Generator())
    assert len(vlm.score_calls) == asked
    assert chosen.sum(1).tolist() == kept.tolist()
    found: dict[int, list[int]] = {}
    while len(found) < 5:
        actions, _ = policy.predict(observations, deterministic=True)
        observations, _, ended, _, infos = envs.step(actions)
        for row in np.flatnonzero(ended):
            found.setdefault(int(row), np.flatnonzero(infos["final_info"]["kept"][row]).tolist())
    assert [found[row] for row in range(5)] == [row.nonzero().flatten().tolist() for row in chosen]


@pytest.mark.parametrize("mode", MODES)
def test_a_hidden_question_is_no_obstacle(mode: str) -> None:
    envs = make(mode, question_aware=False)
    policy, seen = make_policy(envs), observe(envs)
    assert "question" not in seen
    actions, values, log_prob = policy(seen)
    assert torch.isfinite(values).all()
    assert torch.isfinite(log_prob).all()
    assert len(actions) == 4


def test_room_that_no_question_takes_changes_nothing() -> None:
    tight, loose = (make("binary", max_question_tokens=count) for count in (6, 40))
    policies = [make_policy(envs) for envs in (tight, loose)]
    with torch.no_grad():
        one, two = (
            policy.get_distribution(observe(envs)).distribution.logits
            for policy, envs in zip(policies, (tight, loose), strict=True)
        )
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_576_tokens_fit_in_a_small_rollout_buffer(mode: str) -> None:
    envs = make(mode, 4, 24, feature_dim=4, obs_dtype="float16")
    sizes: dict[str, Any] = {"policy_kwargs": {"features_extractor_kwargs": SMALL}, "device": "cpu", "n_steps": 2}
    kind: Any = A2C if mode == "scores" else PPO
    model = kind(SetPolicy, as_sb3_vec_env(envs), **sizes, **({} if kind is A2C else {"batch_size": 8}))
    before = {name: value.clone() for name, value in model.policy.named_parameters()}
    model.learn(8)
    assert any(not value.equal(before[name]) for name, value in model.policy.named_parameters())
    assert all(torch.isfinite(value).all() for value in model.policy.parameters())
    stored = model.rollout_buffer.observations
    assert stored["tokens"].dtype == np.float16
    assert stored["tokens"].nbytes == 2 * 4 * 576 * 4 * 2


def test_a_policy_of_the_library_can_be_saved_and_loaded_by_it(tmp_path: Any) -> None:
    envs = make("binary")
    model = PPO(
        SetPolicy, as_sb3_vec_env(envs), n_steps=2, batch_size=8, device="cpu", seed=0,
        policy_kwargs={"features_extractor_kwargs": SMALL},
    )  # fmt: skip
    model.learn(8)
    model.save(tmp_path / "model")
    again = PPO.load(tmp_path / "model", device="cpu")
    observations, _ = envs.reset(seed=0)
    one, two = (each.predict(observations, deterministic=True)[0] for each in (model, again))
    np.testing.assert_array_equal(one, two)


def test_other_spaces_are_refused() -> None:
    envs = TokenSelectionEnv(FakeVLM(), FakeTask(), max_question_tokens=8)
    with pytest.raises(ValueError, match="tokens and a budget"):
        SetPolicy(envs.observation_space["tokens"], envs.action_space, lambda _: 1e-3)
    with pytest.raises(ValueError, match="binary, real-valued or discrete"):
        SetPolicy(envs.observation_space, MultiDiscrete([2, 2]), lambda _: 1e-3)
