from __future__ import annotations

import inspect
import math
import subprocess
import sys
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

import grip_env
from grip_env.envs.core.sampling import EpisodeStream, shuffled_indices, tokens_in_budget
from grip_env.envs.selection import TokenSelectionEnv, TokenSelectionVectorEnv
from grip_env.tasks.scenes import SceneTask
from grip_env.vlms.base import Scores
from tests.fakes import INFO_KEYS, WIDTH, FakeTask, FakeVLM, expected_log_likelihood, indices


def make(**arguments: Any) -> TokenSelectionEnv:
    defaults: dict[str, Any] = {"vlm": FakeVLM(), "task": FakeTask(), "budget": 0.25}
    return TokenSelectionEnv(**(defaults | arguments))


def binary(*chosen: int, count: int = 16) -> np.ndarray:
    action = np.zeros(count, dtype=np.int8)
    action[list(chosen)] = 1
    return action


# -- the interface ---------------------------------------------------------------------------------------


def test_made_environment_runs_on_scenes() -> None:
    env = gymnasium.make("GRIP/TokenSelection-v0", vlm=FakeVLM(12), action_mode="scores", split="test")
    observation, info = env.reset(seed=3)
    assert observation["tokens"].shape == (144, WIDTH)
    assert info["k"] == 14
    example = SceneTask().example("test", info["index"])
    assert env.unwrapped.example.question == example.question  # type: ignore[attr-defined]
    action = np.zeros(144, dtype=np.float32)
    action[indices(info["relevant"])] = 1.0
    _, reward, terminated, truncated, info = env.step(action)
    assert (terminated, truncated) == (True, False)
    assert len(indices(info["kept"])) == 14
    assert float(reward) > -1.9


def test_observation_has_the_documented_fields() -> None:
    env = make()
    observation, _ = env.reset(seed=0)
    shapes = {key: (value.shape, value.dtype) for key, value in observation.items()}
    assert shapes == {
        "tokens": ((16, WIDTH), np.float32),
        "token_mask": ((16,), np.int8),
        "positions": ((16, 2), np.float32),
        "question": ((24, WIDTH), np.float32),
        "question_mask": ((24,), np.int8),
        "budget": ((1,), np.float32),
    }
    assert observation in env.observation_space
    assert observation["question_mask"].sum() == 6  # "what is number 7 of train?"
    assert (observation["question"][6:] == 0).all()
    assert (observation["question"][:6] != 0).any(1).all()
    np.testing.assert_allclose(observation["positions"][5], [0.375, 0.375])


def test_question_can_be_hidden() -> None:
    env = make(question_aware=False, max_question_tokens=1)  # nothing of it is shown: no length is too long
    observation, _ = env.reset(seed=0)
    assert set(observation) == {"tokens", "token_mask", "positions", "budget"}
    assert observation in env.observation_space


@pytest.mark.parametrize("relevance", [True, False])
def test_info_has_the_documented_keys_and_never_nan(relevance: bool) -> None:
    env = make(task=FakeTask(relevance=relevance))
    _, start = env.reset(seed=0)
    _, _, _, _, end = env.step(binary(1, 2))
    assert set(start) == set(end) == INFO_KEYS | {"over_budget"}
    assert (indices(start["kept"]), indices(end["kept"])) == ([], [1, 2])
    assert (start["kept_count"], end["kept_count"]) == (0, 2)
    assert (start["scored"], start["log_likelihood"], start["correct"], end["scored"]) == (False, 0.0, False, True)
    assert start["relevance_known"] == end["relevance_known"] == relevance
    assert start["relevant_count"] == start["relevant"].sum()
    assert (start["relevant_count"] > 0) == relevance
    assert end["correct"].dtype == bool
    values = [value for info in (start, end) for value in info.values() if isinstance(value, float)]
    assert not any(math.isnan(value) for value in values)


def test_relevant_tokens_are_those_with_a_grade() -> None:
    env = make()
    _, info = env.reset(options={"index": 3})
    grades = FakeTask().example("train", 3).relevance
    assert grades is not None
    assert indices(info["relevant"]) == np.flatnonzero(grades).tolist()
    assert info["relevant_count"] == 3


def test_returned_arrays_are_copies() -> None:
    env = make()
    first, info = env.reset(seed=0)
    kept = {key: value.copy() for key, value in first.items()}
    relevant = indices(info["relevant"])
    for value in first.values():
        value.fill(1)
    for name in ("relevant", "kept"):
        info[name].fill(True)
    last, _, _, _, info = env.step(binary())
    again, second = env.reset(seed=0)
    for key, value in kept.items():
        np.testing.assert_array_equal(last[key], value)
        np.testing.assert_array_equal(again[key], value)
        assert not np.shares_memory(last[key], again[key])
    assert indices(info["relevant"]) == indices(second["relevant"]) == relevant


# -- reward ----------------------------------------------------------------------------------------------


def test_reward_is_the_models_score_of_what_was_kept() -> None:
    env = make(action_mode="scores")
    generator = np.random.default_rng(0)
    for seed in range(5):
        _, start = env.reset(seed=seed)
        scores = generator.normal(size=16)
        _, reward, _, _, info = env.step(scores)
        assert indices(info["kept"]) == sorted(np.argsort(-scores)[:4].tolist())
        likelihood = expected_log_likelihood(indices(info["kept"]), indices(start["relevant"]))
        full = expected_log_likelihood(range(16), indices(start["relevant"]))
        assert info["log_likelihood"] == pytest.approx(likelihood, abs=1e-6)
        assert info["full_log_likelihood"] == start["full_log_likelihood"] == pytest.approx(full, abs=1e-6)
        assert reward == pytest.approx(likelihood - full, abs=1e-6)
        assert info["correct"] == (likelihood > -1.0)


def test_everything_kept_costs_nothing() -> None:
    env = make(budget=1.0)
    env.reset(seed=0)
    _, reward, _, _, info = env.step(np.ones(16, dtype=np.int8))
    assert reward == 0.0
    assert indices(info["kept"]) == list(range(16))


def test_reward_can_be_named_or_given() -> None:
    def minus_one(scores: Scores, full: Scores) -> torch.Tensor:
        return torch.full_like(scores.log_likelihood, -1.0)

    rewards = []
    for reward in ("probability", "exact_match", minus_one):
        env = make(reward=reward)
        env.reset(seed=0)
        rewards.append(env.step(binary())[1])
    assert rewards == pytest.approx([math.exp(-2.0), 0.0, -1.0])


# -- actions ---------------------------------------------------------------------------------------------


def test_binary_action_over_budget_keeps_a_random_part_and_tells_the_excess() -> None:
    env = make(over_budget_penalty=0.5)
    chosen, counts = [1, 3, 5, 7, 9, 11], np.zeros(16)
    _, start = env.reset(seed=0, options={"index": 3})
    for _ in range(300):
        _, reward, _, _, info = env.step(binary(*chosen))
        assert (info["over_budget"], info["k"], len(indices(info["kept"]))) == (2, 4, 4)
        assert set(indices(info["kept"])) <= set(chosen)
        assert reward == pytest.approx(info["log_likelihood"] - info["full_log_likelihood"] - 0.5 * 2, abs=1e-6)
        counts[indices(info["kept"])] += 1
        env.reset(options={"index": 3})
    assert start["k"] == 4
    np.testing.assert_allclose(counts[chosen] / 300, 4 / 6, atol=0.1)  # three standard deviations: 0.08
    assert counts.sum() == counts[chosen].sum()


def test_over_budget_draws_follow_the_seed() -> None:
    kept: list[list[list[int]]] = []
    for _ in range(2):
        env = make()
        env.reset(seed=5)
        kept.append([])
        for _ in range(5):
            kept[-1].append(indices(env.step(np.ones(16, dtype=np.int8))[-1]["kept"]))
            env.reset()
    assert kept[0] == kept[1]
    assert len({tuple(row) for row in kept[0]}) > 1


def test_fewer_than_k_and_none_are_allowed() -> None:
    env = make(over_budget_penalty=1.0)
    _, start = env.reset(seed=0)
    _, reward, terminated, _, info = env.step(binary())
    assert (indices(info["kept"]), info["over_budget"], terminated) == ([], 0, True)
    assert info["log_likelihood"] == pytest.approx(-2.0)
    assert reward == pytest.approx(-2.0 - start["full_log_likelihood"])
    env.reset(seed=0)
    assert indices(env.step(binary(8))[-1]["kept"]) == [8]


def test_which_of_equal_scores_is_drawn_and_bounds_do_not_matter() -> None:
    env = make(action_mode="scores")  # k = 4
    env.reset(seed=0)
    scores = np.array([0, 5, 1e30, 5, 5, -1e30, 5, 0, 0, 0, 0, 0, 0, 0, 0, -np.inf])
    seen = set()
    for _ in range(60):
        kept = indices(env.step(scores)[-1]["kept"])
        assert len(kept) == 4
        assert 2 in kept
        seen.add(tuple(kept))
        env.reset()
    assert seen == {tuple(sorted({1, 2, 3, 4, 6} - {left_out})) for left_out in (1, 3, 4, 6)}


@pytest.mark.parametrize("extreme", [np.inf, -np.inf, 0.0])
def test_all_equal_scores_keep_every_token_equally_often(extreme: float) -> None:
    env = make(action_mode="scores")
    env.reset(seed=3)
    counts = np.zeros(16)
    for _ in range(400):
        counts[env.step(np.full(16, extreme))[-1]["kept"]] += 1
        env.reset()
    assert counts.sum() == 1600
    assert abs(counts - 100).max() < 40  # a standard deviation of 8.7 each


@pytest.mark.parametrize("vector", [False, True], ids=["single", "vector"])
def test_clipped_scores_do_not_favour_the_top_of_the_picture(vector: bool) -> None:
    """Of 144 scores drawn from N(0, 1) and clipped, 23 are 1 on average, and k = 14."""
    arguments: dict[str, Any] = {"vlm": FakeVLM(side=12), "task": FakeTask(), "budget": 0.1}
    policy = np.random.default_rng(5)
    means: list[float] = []
    edge = 0
    if vector:
        envs: Any = gymnasium.make_vec("GRIP/TokenScores-v0", 50, **arguments)
        envs.reset(seed=0)
        for _ in range(8):
            actions = policy.standard_normal((50, 144)).clip(-1, 1)
            edge += int((actions == 1).sum())
            means += [float(np.mean(kept)) for kept in indices(envs.step(actions)[-1]["final_info"]["kept"])]
    else:
        env: Any = gymnasium.make("GRIP/TokenScores-v0", **arguments)
        for episode in range(400):
            env.reset(seed=0 if episode == 0 else None)
            action = policy.standard_normal(144).clip(-1, 1)
            edge += int((action == 1).sum())
            means.append(float(np.mean(indices(env.step(action)[-1]["kept"]))))
    assert 22 < edge / 400 < 24
    # lower indices first gave 48; the mean of 400 means of 14 places has a standard deviation of 0.55
    assert np.mean(means) == pytest.approx(71.5, abs=2)


def test_only_a_tie_at_the_cut_draws_from_the_generator() -> None:
    env = make(action_mode="scores")  # k = 4
    env.reset(seed=0)
    before = env.np_random.bit_generator.state
    clear = np.arange(16.0)
    for scores in (clear, np.minimum(clear, 12.0), np.maximum(clear, 11.0), np.full(16, -np.inf) + 0 * clear):
        draws = len(set(scores)) == 1
        env.step(scores)
        assert (env.np_random.bit_generator.state != before) == draws
        env.reset()
    everything = make(action_mode="scores", budget=1.0)
    everything.reset(seed=0)
    before = everything.np_random.bit_generator.state
    assert indices(everything.step(np.zeros(16))[-1]["kept"]) == list(range(16))
    assert everything.np_random.bit_generator.state == before


def test_padding_is_masked_and_never_kept() -> None:
    vlm = FakeVLM(count=lambda example: 10)
    for mode, action in (("binary", np.ones(16, dtype=np.int8)), ("scores", np.arange(16.0))):
        env = make(vlm=vlm, max_tokens=16, action_mode=mode, budget=0.5)
        observation, start = env.reset(seed=0)
        assert observation["token_mask"].tolist() == [1] * 10 + [0] * 6
        assert (observation["tokens"][10:] == 0).all()
        assert start["k"] == 5
        np.testing.assert_allclose(observation["budget"], [0.5])
        _, _, _, _, info = env.step(action)
        assert len(indices(info["kept"])) == 5
        assert max(indices(info["kept"])) < 10
        assert info["over_budget"] == (5 if mode == "binary" else 0)


def test_examples_of_different_sizes_share_one_space() -> None:
    vlm = FakeVLM(count=lambda example: 16 if "number 0" in example.question else 9)
    env = make(vlm=vlm, budget=0.25)
    sizes = set()
    env.reset(seed=0)
    for _ in range(10):
        observation, info = env.reset()
        assert observation in env.observation_space
        real = int(observation["token_mask"].sum())
        sizes.add(real)
        assert info["k"] == tokens_in_budget(0.25, real)
        assert info["full_log_likelihood"] == pytest.approx(
            expected_log_likelihood(range(real), indices(info["relevant"])), abs=1e-6
        )
    assert sizes == {9, 16}


@pytest.mark.parametrize("shape", [(15,), (17,), (1, 16), ()])
@pytest.mark.parametrize("mode", ["binary", "scores"])
def test_wrong_shapes_are_refused_with_both_shapes(mode: str, shape: tuple[int, ...]) -> None:
    env = make(action_mode=mode)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"has shape \(.*expected \(16,\)") as error:
        env.step(np.zeros(shape))
    assert str(shape) in str(error.value)
    env.step(np.zeros(16))  # a refused action does not end the episode


def test_nan_scores_and_non_binary_actions_are_refused() -> None:
    env = make(action_mode="scores")
    env.reset(seed=0)
    with pytest.raises(ValueError, match="NaN for 1 of its 16 scores"):
        env.step(np.array([np.nan] + [0.0] * 15))
    env = make()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"0\.5.*action_mode='scores'"):
        env.step(np.full(16, 0.5))


# -- budgets and options ---------------------------------------------------------------------------------


def test_fixed_budget_gives_the_documented_k() -> None:
    for budget, k in ((0.001, 1), (0.1, 2), (0.25, 4), (1.0, 16)):
        env = make(budget=budget)
        observation, info = env.reset(seed=0)
        assert info["k"] == k == max(1, round(budget * 16))
        assert observation["budget"] == np.float32(k / 16)


def test_budget_range_is_log_uniform() -> None:
    stream = EpisodeStream(np.random.default_rng(0), 10, (0.01, 1.0))
    draws = np.array([stream.next_budget() for _ in range(4000)])
    assert draws.min() >= 0.01
    assert draws.max() <= 1.0
    exponents = np.log(draws / 0.01) / np.log(100)  # uniform in [0, 1] if the draws are log-uniform
    np.testing.assert_allclose(np.quantile(exponents, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.03)


def test_listed_budgets_all_come_and_equally_often() -> None:
    env = make(budget=[0.125, 0.25, 0.5])
    env.reset(seed=0)
    ks = [env.reset()[1]["k"] for _ in range(300)]
    values, counts = np.unique(ks, return_counts=True)
    assert values.tolist() == [2, 4, 8]
    assert counts.min() > 70


@pytest.mark.parametrize("budget", [0, -0.1, 1.5, float("nan"), [], [0.5, 2.0], (0.5, 0.1), (0.1, 0.2, 0.3), "0.1"])
def test_impossible_budgets_are_refused(budget: Any) -> None:
    with pytest.raises(ValueError, match="budget"):
        make(budget=budget)


def test_options_fix_an_episode() -> None:
    env = make(budget=(0.1, 0.9))
    _, info = env.reset(seed=0, options={"index": 7, "budget": 0.5})
    assert (info["index"], info["k"]) == (7, 8)
    assert env.example.question == "what is number 7 of train?"
    _, info = env.reset(options={"budget": 0.125})
    assert info["k"] == 2


def test_fixed_index_leaves_the_shuffle_where_it_is() -> None:
    plain, detour = make(), make()
    expected = [plain.reset(seed=4 if i == 0 else None)[1]["index"] for i in range(6)]
    found = [detour.reset(seed=4)[1]["index"]]
    for _ in range(5):
        detour.reset(options={"index": 2})
        found.append(detour.reset()[1]["index"])
    assert found == expected


def test_bad_options_are_refused_and_leave_the_shuffle_where_it_is() -> None:
    env, other = make(), make()
    env.reset(seed=0)
    other.reset(seed=0)
    with pytest.raises(ValueError, match=r"\['seed'\].*budget, index"):
        env.reset(options={"seed": 3})
    with pytest.raises(IndexError, match="0 to 9"):
        env.reset(options={"index": 10})
    with pytest.raises(ValueError, match="share"):
        env.reset(seed=5, options={"budget": 3})
    assert env.reset()[1]["index"] == other.reset()[1]["index"]


# -- order of episodes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000])
def test_shuffle_is_a_permutation_and_every_pass_another(size: int) -> None:
    passes = [shuffled_indices(11, turn * size, size, size).tolist() for turn in range(2)]
    assert all(sorted(order) == list(range(size)) for order in passes)
    if size >= 16:
        assert passes[0] != passes[1]
        assert passes[0] != shuffled_indices(12, 0, size, size).tolist()


def test_shuffle_looks_uniform() -> None:
    counts = np.zeros((8, 8))
    for key in range(2000):
        counts[np.arange(8), shuffled_indices(key, 0, 8, 8)] += 1
    np.testing.assert_allclose(counts / 2000, 1 / 8, atol=0.03)  # four standard deviations


def test_large_splits_are_shuffled_without_being_laid_out() -> None:
    drawn = shuffled_indices(1, 0, 1000, 10**12).tolist()
    assert len(set(drawn)) == 1000
    assert 0.4 < np.mean(drawn) / 10**12 < 0.6


def test_each_pass_visits_every_instance_once() -> None:
    env = make()
    indices = [env.reset(seed=9 if i == 0 else None)[1]["index"] for i in range(30)]
    passes = [indices[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(turn) == list(range(10)) for turn in passes)
    assert passes[0] != passes[1] != passes[2]


# -- misuse, cache, package ------------------------------------------------------------------------------


def test_step_needs_a_running_episode() -> None:
    env = make()
    with pytest.raises(gymnasium.error.ResetNeeded, match="not begun"):
        env.step(binary())
    env.reset(seed=0)
    env.step(binary())
    with pytest.raises(gymnasium.error.ResetNeeded, match="ended at step 1"):
        env.step(binary())
    with pytest.raises(gymnasium.error.ResetNeeded):
        make(render_mode="rgb_array").render()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"action_mode": "sequential"}, "'binary' or 'scores'"),
        ({"split": "dev"}, "train, test"),
        ({"task": "vqa"}, "'scenes'"),
        ({"reward": "kl"}, "exact_match"),
        ({"cache_size": -1}, "cache_size must be at least 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"over_budget_penalty": -1.0}, "over_budget_penalty"),
    ],
)
def test_bad_arguments_are_refused_with_the_fix(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_too_many_tokens_are_refused_with_the_number_to_pass() -> None:
    with pytest.raises(ValueError, match=r"6 question tokens.*room for 5.*max_question_tokens=6"):
        make(max_question_tokens=5).reset(seed=0)
    with pytest.raises(ValueError, match=r"16 visual tokens.*room for 10.*max_tokens=16"):
        make(max_tokens=10).reset(seed=0)


def test_cached_examples_are_not_encoded_again_and_the_oldest_go_first() -> None:
    vlm = FakeVLM()
    env = make(vlm=vlm, cache_size=2, max_tokens=16)
    assert vlm.encode_calls == []

    def encodes(index: int) -> bool:
        before = len(vlm.encode_calls), len(vlm.score_calls)
        env.reset(options={"index": index})
        work = len(vlm.encode_calls) - before[0], len(vlm.score_calls) - before[1]
        assert work in ((0, 0), (1, 1))
        return work == (1, 1)

    assert [encodes(index) for index in (0, 1, 0, 2, 0, 1)] == [True, True, False, True, False, True]
    env = make(vlm=vlm, cache_size=0)
    assert [encodes(index) for index in (0, 0)] == [True, True]


def test_both_environments_take_the_same_arguments() -> None:
    single = dict(inspect.signature(TokenSelectionEnv).parameters)
    vector = dict(inspect.signature(TokenSelectionVectorEnv).parameters)
    assert vector.pop("num_envs").default == 1
    assert vector.pop("max_episode_steps").default is None
    assert vector.pop("autoreset_mode").default is AutoresetMode.SAME_STEP
    assert single == vector


def test_public_names_exist_and_importing_them_is_lazy() -> None:
    assert set(grip_env.__all__) <= set(dir(grip_env))
    assert grip_env.TokenSelectionEnv is TokenSelectionEnv
    with pytest.raises(AttributeError, match="nonsense"):
        grip_env.nonsense  # noqa: B018
    code = "import sys, grip_env; print({'torch', 'transformers', 'PIL', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_stable_baselines_ppo_runs() -> None:
    from stable_baselines3 import PPO

    env = make(action_mode="scores", budget=(0.1, 0.5))
    model = PPO("MultiInputPolicy", env, n_steps=8, batch_size=8, n_epochs=1, seed=0, device="cpu")
    before = model.policy.state_dict()["action_net.weight"].clone()
    model.learn(16)
    assert model.num_timesteps == 16
    assert not torch.equal(before, model.policy.state_dict()["action_net.weight"])
    assert all(episode["l"] == 1 for episode in model.ep_info_buffer or [])


@pytest.mark.parametrize(
    "options",
    [{"index": 2.7}, {"index": "3"}, {"index": True}, {"budget": (0.1, 0.2)}, {"budget": {"low": 0.1, "high": 0.2}}],
)
def test_reset_options_of_another_kind_are_refused(options: dict[str, Any]) -> None:
    env = make()
    with pytest.raises(ValueError, match="the reset option"):
        env.reset(seed=0, options=options)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (None, "a budget is a number"),
        ([0.1, None], "a budget is a number"),
        ({"low": 0.3, "high": 0.1}, "goes from low to high; got low=0.3, high=0.1"),
        ({"low": 0.3}, "a mapping as budget is a range"),
    ],
)
def test_budgets_that_are_none_are_refused(budget: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(budget=budget)
