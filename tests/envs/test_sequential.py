from __future__ import annotations

import gc
import inspect
import math
import warnings
from itertools import pairwise
from typing import Any

import gymnasium
import matplotlib
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import RenderCollection
from hypothesis import given, settings
from hypothesis import strategies as st

import grip_env
from grip_env.envs.core.instances import Instance
from grip_env.envs.core.rules import Episode
from grip_env.envs.selection import TokenSelectionEnv, TokenSelectionVectorEnv
from grip_env.envs.sequential import SequentialSelectionEnv, SequentialSelectionVectorEnv
from grip_env.vlms.base import Encoded
from tests.fakes import INFO_KEYS, WIDTH, FakeTask, FakeVLM, expected_log_likelihood, indices

DEFAULTS: dict[str, Any] = {"task": FakeTask(), "budget": 0.25}


def make(**arguments: Any) -> SequentialSelectionEnv:
    return SequentialSelectionEnv(**({"vlm": FakeVLM()} | DEFAULTS | arguments))


def make_vector(num_envs: int = 3, **arguments: Any) -> SequentialSelectionVectorEnv:
    return SequentialSelectionVectorEnv(num_envs, **({"vlm": FakeVLM()} | DEFAULTS | arguments))


def varying(example: Any) -> int:
    """Give examples 10 to 16 tokens."""
    return 16 - 3 * (len(example.question) % 3)


def play(env: gymnasium.Env[Any, Any], actions: Any) -> tuple[list[float], dict[str, Any]]:
    """Take actions to the episode's end; return the rewards and the last info."""
    rewards, terminated, info = [], False, {}
    for action in actions:
        assert not terminated
        _, reward, terminated, truncated, info = env.step(action)
        assert not truncated
        rewards.append(float(reward))
    assert terminated
    return rewards, info


def one_shot(env: SequentialSelectionEnv, index: int, budget: float, kept: list[int]) -> tuple[float, dict[str, Any]]:
    """Keep a set in the environment of a single decision."""
    rules = env.rules
    other = TokenSelectionEnv(
        rules.vlm, rules.task, rules.split, reward=rules.reward, max_tokens=rules.max_tokens, action_mode="binary"
    )
    other.reset(options={"index": index, "budget": budget})
    _, reward, _, _, info = other.step(np.isin(np.arange(rules.max_tokens), kept).astype(np.int8))
    return float(reward), info


# -- the interface ---------------------------------------------------------------------------------------


def test_spaces_are_those_documented() -> None:
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
        "selected": ((16,), np.int8),
    }
    assert observation in env.observation_space
    assert env.action_space == gymnasium.spaces.Discrete(16)
    assert set(make(question_aware=False).reset()[0]) == {"tokens", "token_mask", "positions", "budget", "selected"}


def test_one_token_per_step_until_k_are_in() -> None:
    env = make()
    first, start = env.reset(seed=0)
    assert start["k"] == 4
    assert first["selected"].sum() == 0
    for step, action in enumerate([7, 2, 11, 0], start=1):
        seen, _, terminated, truncated, info = env.step(action)
        chosen = sorted([7, 2, 11, 0][:step])
        assert indices(info["kept"]) == np.flatnonzero(seen["selected"]).tolist() == chosen
        assert (terminated, truncated, info["k"], info["invalid_actions"]) == (step == 4, False, 4, 0)
        for key in set(first) - {"selected"}:
            np.testing.assert_array_equal(seen[key], first[key])
    with pytest.raises(gymnasium.error.ResetNeeded, match="ended at step 4"):
        env.step(5)


def test_episodes_are_those_of_the_one_shot_environment() -> None:
    ours, theirs = make(budget=(0.1, 0.9)), TokenSelectionEnv(FakeVLM(), FakeTask(), budget=(0.1, 0.9))
    for turn in range(15):
        (seen, info), (expected, start) = (env.reset(seed=3 if turn == 0 else None) for env in (ours, theirs))
        assert seen.pop("selected").sum() == 0
        for key in ("action_mask", "invalid_actions"):
            info.pop(key)
        start.pop("over_budget")
        assert data_equivalence((seen, info), (expected, start), exact=True)
        play(ours, range(info["k"]))


@pytest.mark.parametrize("relevance", [True, False])
@pytest.mark.parametrize("dense", [True, False])
def test_info_has_the_documented_keys_and_never_nan(dense: bool, relevance: bool) -> None:
    env = make(task=FakeTask(relevance=relevance), dense=dense)
    _, info = env.reset(seed=0)
    assert set(info) == INFO_KEYS | {"invalid_actions", "action_mask"}
    assert (info["scored"], info["kept_count"], info["relevance_known"]) == (False, 0, relevance)
    for step, action in enumerate([3, 3, 0, 1, 2]):
        _, reward, terminated, _, info = env.step(action)
        asked = (dense and step != 1) or terminated
        assert set(info) == INFO_KEYS | {"invalid_actions", "action_mask"}
        assert info["scored"] == asked
        assert (info["log_likelihood"] < 0) == asked
        assert not any(isinstance(value, float) and math.isnan(value) for value in (reward, *info.values()))
    assert terminated
    assert info["correct"].dtype == bool


def test_masks_tell_the_legal_actions_everywhere_alike() -> None:
    env = gymnasium.make("GRIP/SequentialSelection-v0", vlm=FakeVLM(count=varying), max_tokens=16, **DEFAULTS)
    for seed in range(4):
        observation, info = env.reset(seed=seed)
        terminated = False
        while not terminated:
            mask = env.get_wrapper_attr("action_masks")()
            assert mask.dtype == bool
            assert info["action_mask"].dtype == np.int8
            np.testing.assert_array_equal(mask, observation["token_mask"] > observation["selected"])
            np.testing.assert_array_equal(mask, info["action_mask"])
            mask.fill(False)  # a copy
            info["action_mask"].fill(0)
            action = int(env.np_random.choice(np.flatnonzero(observation["token_mask"] > observation["selected"])))
            observation, _, terminated, _, info = env.step(action)
            assert info["invalid_actions"] == 0


def test_illegal_actions_are_ignored_counted_and_charged() -> None:
    vlm = FakeVLM(count=lambda example: 10)
    env = make(vlm=vlm, max_tokens=16, budget=0.3, invalid_action_penalty=0.5)
    before, start = env.reset(seed=0)
    assert start["k"] == 3
    calls = len(vlm.score_calls)
    padding, reward, terminated, _, info = env.step(12)
    assert (reward, terminated, info["invalid_actions"], indices(info["kept"])) == (-0.5, False, 1, [])
    assert data_equivalence(padding, before, exact=True)
    assert len(vlm.score_calls) == calls
    env.step(4)
    _, reward, _, _, info = env.step(4)
    assert (reward, info["invalid_actions"], indices(info["kept"])) == (-0.5, 2, [4])
    for _ in range(13):  # the sixteenth would end it
        _, _, terminated, _, info = env.step(4)
        assert not terminated
    _, info = play(env, [5, 6])
    assert info["invalid_actions"] == 15
    assert env.reset()[1]["k"] == 3
    assert env.step(0)[-1]["invalid_actions"] == 0  # counted by episode


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (16, r"action 16 is out of range.*0 to 15"),
        (-1, r"action -1 is out of range"),
        (np.array([3]), r"shape \(1,\), expected \(\)"),
        (2.0, "float64, expected an integer"),
        (True, "bool, expected an integer"),
        (None, "expected an integer"),
    ],
)
def test_what_is_no_index_is_refused_and_changes_nothing(action: Any, message: str) -> None:
    env = make()
    env.reset(seed=0)
    env.step(1)
    with pytest.raises(ValueError, match=message):
        env.step(action)
    _, _, _, _, info = env.step(np.int64(2))
    assert (indices(info["kept"]), info["invalid_actions"]) == ([1, 2], 0)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(("legal", "limit"), [([], None), ([3, 5], None), ([3], 2), ([], 1)])
def test_repeating_an_illegal_action_ends_the_episode_and_pays_for_what_is_in(
    dense: bool, legal: list[int], limit: int | None
) -> None:
    """Were the end free, doing nothing would pay 0, which stands for nothing lost."""
    vlm = FakeVLM(count=lambda example: 13)  # 13 to 15 are padding: never legal
    env = make(vlm=vlm, dense=dense, max_tokens=16, max_invalid_actions=limit, invalid_action_penalty=0.5)
    env.reset(seed=0, options={"index": 2})
    most = 16 if limit is None else limit
    rewards, info = play(env, [*legal, *[15] * most])
    assert indices(info["kept"]) == legal
    assert info["invalid_actions"] == most
    worth, same = one_shot(env, 2, 0.25, legal)
    assert sum(rewards) == pytest.approx(worth - 0.5 * most, abs=1e-6)
    assert info["log_likelihood"] == pytest.approx(same["log_likelihood"], abs=1e-6)
    assert worth < -0.1
    with pytest.raises(gymnasium.error.ResetNeeded, match=f"ended at step {len(legal) + most}"):
        env.step(0)
    assert env.reset()[1]["action_mask"].sum() == 13


def test_many_end_at_the_limit_each_by_itself() -> None:
    envs = make_vector(3, max_invalid_actions=2)
    envs.reset(seed=0)
    envs.step(np.array([4, 4, 4]))
    ends = [envs.step(np.array(actions))[2].tolist() for actions in ([4, 4, 5], [4, 5, 5], [0, 4, 5])]
    assert ends == [[False] * 3, [True, False, False], [False, True, True]]


@pytest.mark.parametrize("case", ["single", "native", "sync", "stable-baselines"])
def test_a_constant_policy_comes_to_an_end_everywhere(case: str) -> None:
    arguments: dict[str, Any] = {"vlm": FakeVLM()} | DEFAULTS
    most = 4 + 16
    if case == "single":
        env = make()
        for _ in range(3):
            env.reset()
            assert any(env.step(7)[2] for _ in range(most))
        return
    if case == "stable-baselines":
        ours: Any = grip_env.as_sb3_vec_env(make_vector(2))
        ours.reset()
        assert any(ours.step(np.full(2, 7))[2].all() for _ in range(most))
        return
    mode = {} if case == "native" else {"vectorization_mode": "sync"}
    envs: Any = gymnasium.make_vec("GRIP/SequentialSelection-v0", 2, **mode, **arguments)
    envs.reset(seed=0)
    assert any(envs.step(np.full(2, 7))[2].all() for _ in range(most))


@pytest.mark.parametrize("native", [False, True], ids=["single", "native"])
def test_stable_baselines_dqn_is_evaluated_though_it_repeats_itself(native: bool) -> None:
    from stable_baselines3 import DQN
    from stable_baselines3.common.evaluation import evaluate_policy

    env: Any = grip_env.as_sb3_vec_env(make_vector(2)) if native else make()
    model = DQN("MultiInputPolicy", env, buffer_size=64, learning_starts=8, seed=0, device="cpu")
    model.learn(32)
    returns, lengths = evaluate_policy(model, env, n_eval_episodes=4, return_episode_rewards=True, warn=False)
    assert isinstance(lengths, list)
    assert max(lengths) > 4, "it repeats itself; were it not so, this would show nothing"
    assert max(lengths) <= 4 + 16
    assert np.isfinite(returns).all()


def test_step_masks_and_render_need_an_episode() -> None:
    env, envs = make(render_mode="rgb_array"), make_vector(render_mode="rgb_array")
    for call in (lambda: env.step(0), env.action_masks, env.render, lambda: envs.step([0] * 3), envs.action_masks):
        with pytest.raises(gymnasium.error.ResetNeeded, match=r"call reset\(\)"):
            call()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"invalid_action_penalty": -1.0}, "invalid_action_penalty"),
        ({"invalid_action_penalty": math.inf}, "finite"),
        ({"invalid_action_penalty": math.nan}, "finite"),
        ({"budget": 0.0}, "budget"),
        ({"render_mode": "ascii"}, "ascii"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ],
)
def test_bad_arguments_are_refused_with_the_fix(arguments: dict[str, Any], message: str) -> None:
    for maker in (make, make_vector):
        with pytest.raises(ValueError, match=message):
            maker(**arguments)


def test_arguments_are_those_of_the_other_environments() -> None:
    single, vector, other = (
        dict(inspect.signature(kind).parameters)
        for kind in (SequentialSelectionEnv, SequentialSelectionVectorEnv, TokenSelectionEnv)
    )
    assert (vector.pop("num_envs").default, vector.pop("max_episode_steps").default) == (1, None)
    assert vector.pop("autoreset_mode").default is AutoresetMode.SAME_STEP
    assert vector == single
    assert (single.pop("dense").default, single.pop("invalid_action_penalty").default) == (True, 0.0)
    assert single.pop("max_invalid_actions").default is None
    del other["action_mode"], other["over_budget_penalty"]
    assert single == other
    assert grip_env.SequentialSelectionEnv is SequentialSelectionEnv
    assert grip_env.SequentialSelectionVectorEnv is SequentialSelectionVectorEnv


def test_returned_arrays_are_copies() -> None:
    env = make()
    first, info = env.reset(seed=0)
    seen, _, _, _, _ = env.step(3)
    for value in (*first.values(), *seen.values(), info["action_mask"], env.action_masks()):
        value.fill(1)
    again, _, _, _, info = env.step(5)
    assert np.flatnonzero(again["selected"]).tolist() == indices(info["kept"]) == [3, 5]
    fresh, _ = env.reset(seed=0)
    assert fresh["selected"].sum() == 0
    assert fresh["tokens"].max() < 1.0
    assert not np.shares_memory(again["tokens"], fresh["tokens"])


# -- rewards ---------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    actions=st.lists(st.integers(0, 15), max_size=40),
    reward=st.sampled_from(["log_likelihood", "probability", "exact_match"]),
    index=st.integers(0, 9),
    budget=st.sampled_from([0.05, 0.2, 0.6, 1.0]),
    penalty=st.sampled_from([0.0, 0.25]),
)
def test_dense_and_sparse_returns_are_the_one_shot_reward(
    actions: list[int], reward: str, index: int, budget: float, penalty: float
) -> None:
    vlm = FakeVLM(count=varying)
    dense, sparse = (
        make(vlm=vlm, max_tokens=16, reward=reward, dense=dense, invalid_action_penalty=penalty)
        for dense in (True, False)
    )
    returns, paid, terminated = np.zeros(2), [0.0, 0.0], False
    for env in (dense, sparse):
        env.reset(options={"index": index, "budget": budget})
    for action in [*actions, *range(16)]:  # any mixture of legal and illegal ones, then all that is left
        (seen, paid[0], terminated, _, info), (same, paid[1], ended, _, _) = (
            env.step(action) for env in (dense, sparse)
        )
        returns += paid
        assert terminated == ended
        assert data_equivalence(seen, same, exact=True)
        if terminated:
            break
    assert terminated
    expected, end = one_shot(dense, index, budget, indices(info["kept"]))
    charged = penalty * info["invalid_actions"]
    assert returns.tolist() == pytest.approx([expected - charged] * 2, abs=1e-12)
    assert (info["log_likelihood"], info["correct"]) == (end["log_likelihood"], end["correct"])


def test_dense_rewards_are_differences_of_the_sets_rewards() -> None:
    env = make()
    _, start = env.reset(seed=0)
    full = expected_log_likelihood(range(16), indices(start["relevant"]))
    before, actions = (
        0.0,
        [*indices(start["relevant"])[:2], *[t for t in range(16) if t not in indices(start["relevant"])][:2]],
    )
    for step, action in enumerate(actions, start=1):
        _, reward, _, _, info = env.step(action)
        value = expected_log_likelihood(actions[:step], indices(start["relevant"])) - full
        assert reward == pytest.approx(value - before, abs=1e-6)
        assert info["log_likelihood"] == pytest.approx(value + full, abs=1e-6)
        before = value


def test_sparse_rewards_come_at_the_end_and_cost_a_single_call() -> None:
    vlm = FakeVLM()
    env = make(vlm=vlm, dense=False)
    _, start = env.reset(seed=0)
    assert vlm.score_calls == [(1, 1, 16)]  # every token kept, for full_log_likelihood
    vlm.score_calls.clear()
    rewards = [env.step(action)[1] for action in (0, 0, 1, 2)]
    assert rewards == [0.0] * 4
    assert vlm.score_calls == []
    _, reward, terminated, *_ = env.step(3)
    assert vlm.score_calls == [(1, 1, 16)]
    assert terminated
    difference = expected_log_likelihood(range(4), indices(start["relevant"])) - expected_log_likelihood(
        range(16), indices(start["relevant"])
    )
    assert reward == pytest.approx(difference, abs=1e-6)
    vlm.score_calls.clear()
    env.reset(seed=0)  # in memory
    assert vlm.score_calls == []


def test_dense_rewards_cost_a_call_for_each_legal_step() -> None:
    vlm = FakeVLM()
    env = make(vlm=vlm)
    env.reset(seed=0)
    calls = []
    for action in (0, 0, 1, 1, 2, 3):
        vlm.score_calls.clear()
        env.step(action)
        calls.append(len(vlm.score_calls))
    assert calls == [1, 0, 1, 0, 1, 1]


@pytest.fixture(scope="module")
def tiny() -> Any:
    return grip_env.load_vlm("tiny")


@pytest.mark.parametrize("dense", [True, False])
def test_the_embedded_model_pays_a_set_alike_in_every_environment(tiny: Any, dense: bool) -> None:
    indices, budget = [0, 3, 5], [0.02, 0.05, 0.03]
    common: dict[str, Any] = {"vlm": tiny, "split": "test"}
    options = {"index": indices, "budget": budget}
    envs = SequentialSelectionVectorEnv(3, dense=dense, **common)
    single = SequentialSelectionEnv(dense=dense, **common)
    at_once = TokenSelectionVectorEnv(3, **common)
    _, infos = envs.reset(seed=0, options=options)
    sets = [np.random.default_rng(i).permutation(144)[:k] for i, k in enumerate(infos["k"])]
    at_once.reset(options=options)
    chosen = np.stack([np.isin(np.arange(144), tokens) for tokens in sets]).astype(np.int8)
    _, expected, _, _, ends = at_once.step(chosen)

    alone = []
    for i in range(3):
        single.reset(options={"index": indices[i], "budget": budget[i]})
        rewards, info = play(single, sets[i])
        alone.append(sum(rewards))
        assert info["correct"] == ends["final_info"]["correct"][i]
    np.testing.assert_allclose(alone, expected, atol=1e-4)

    together, steps = np.zeros(3), infos["k"].copy()
    running = np.ones(3, dtype=bool)
    while running.any():
        actions = [tokens[len(tokens) - left] if left > 0 else 0 for tokens, left in zip(sets, steps, strict=True)]
        _, rewards, terminated, _, _ = envs.step(np.array(actions))
        together += np.where(running, rewards, 0.0)
        steps -= 1
        running &= ~terminated
    np.testing.assert_allclose(together, expected, atol=1e-4)


# -- pictures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [True, False])
def test_frames_of_an_episode_have_one_size_and_show_what_is_kept(dense: bool) -> None:
    env: Any = RenderCollection(make(render_mode="rgb_array", dense=dense), pop_frames=False)
    _, start = env.reset(seed=0)
    actions = [8, 8, 12, 10, 14]  # none of which touches another
    play(env, actions)
    frames = env.render()
    assert len(frames) == 6
    assert {frame.shape for frame in frames} == {frames[0].shape}
    assert {frame.dtype for frame in frames} == {np.dtype(np.uint8)}
    cells = [frame[:480].reshape(4, 120, 4, 120, 3)[:, 30:50, :, 30:50].mean((1, 3, 4)).reshape(16) for frame in frames]
    for step in range(1, 6):
        bright = np.flatnonzero(np.abs(cells[step] - cells[0]) < 1)
        assert bright.tolist() == sorted(set(actions[:step]))
    assert start["k"] == 4


def test_human_mode_draws_every_step_into_one_window() -> None:
    matplotlib.use("Agg", force=True)
    from matplotlib import pyplot

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = make(render_mode="human")
        env.reset(seed=0)
        shown = []
        for action in range(4):
            env.step(action)
            shown.append(np.asarray(pyplot.gcf().canvas.buffer_rgba()).copy())  # type: ignore[attr-defined]
        assert len(pyplot.get_fignums()) == 1
        assert all((a != b).any() for a, b in pairwise(shown))
        env.close()
    assert pyplot.get_fignums() == []


# -- many at once ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "arguments"),
    [
        (300, {"budget": (0.05, 0.7)}),
        (200, {"budget": [0.1, 0.5], "dense": False, "invalid_action_penalty": 0.25, "cache_size": 2}),
        (100, {"budget": 0.4, "task": FakeTask(relevance=False), "question_aware": False, "reward": "probability"}),
        (100, {"budget": (0.05, 0.7), "max_episode_steps": 5}),
        (60, {"budget": 0.25, "dense": False, "max_episode_steps": 4, "cache_size": 0}),
    ],
    ids=["dense", "sparse", "hidden", "limit", "sparse limit"],
)
def test_equals_single_environments_run_in_turn(steps: int, arguments: dict[str, Any]) -> None:
    kwargs = DEFAULTS | {"vlm": FakeVLM(count=varying), "max_tokens": 16} | arguments
    ours = SequentialSelectionVectorEnv(4, **kwargs)
    theirs: SyncVectorEnv = SyncVectorEnv(
        [lambda: gymnasium.make("GRIP/SequentialSelection-v0", **kwargs)] * 4, autoreset_mode=AutoresetMode.SAME_STEP
    )
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    assert data_equivalence(ours.reset(seed=7), theirs.reset(seed=7))
    generator, ends, illegal = np.random.default_rng(0), np.zeros(4, dtype=int), 0
    for _ in range(steps):
        actions = generator.integers(16, size=4)
        legal = ours.action_masks()
        illegal += int((~legal[np.arange(4), actions]).sum())
        np.testing.assert_array_equal(legal, np.stack(theirs.call("action_masks")))
        found, expected = ours.step(actions), theirs.step(actions)
        assert data_equivalence(found, expected)
        assert {key: value.dtype for key, value in found[0].items()} == {
            key: value.dtype for key, value in expected[0].items()
        }
        ends += found[2] | found[3]
    assert illegal > steps / 5
    assert (ends >= steps / 20).all()
    assert ours.np_random_seed == theirs.np_random_seed == (7, 8, 9, 10)
    seeds: list[int | None] = [3, None, 3, 5]
    assert data_equivalence(ours.reset(seed=seeds), theirs.reset(seed=list(seeds)))


def test_episodes_end_at_different_steps_and_the_others_go_on() -> None:
    envs = make_vector(2)
    envs.reset(seed=0, options={"budget": [0.125, 0.25]})  # k = 2 and 4
    ends, kept = [], []
    for step in range(4):
        observations, _, terminated, _, infos = envs.step(np.array([step, step]))
        ends.append(terminated.tolist())
        kept.append(observations["selected"].sum(1).tolist())
        if step == 1:
            assert indices(infos["final_info"]["kept"]) == [[0, 1], []]
            assert infos["_final_info"].tolist() == infos["final_info"]["_kept"].tolist() == [True, False]
            assert indices(infos["kept"]) == [[], [0, 1]]
            assert infos["_kept"].tolist() == infos["_index"].tolist() == [True, True]
            assert infos["final_obs"][0]["selected"].tolist() == [1, 1] + [0] * 14
            assert infos["final_obs"][1] is None
    assert ends == [[False, False], [True, False], [False, False], [False, True]]
    assert kept == [[1, 1], [0, 2], [1, 3], [2, 0]]


@pytest.mark.parametrize("dense", [True, False])
def test_one_call_of_the_model_per_step_at_most(dense: bool) -> None:
    vlm = FakeVLM()
    envs = make_vector(4, vlm=vlm, task=FakeTask(10**9), max_tokens=16, dense=dense, budget=(0.1, 0.6))
    envs.reset(seed=0)
    assert (len(vlm.encode_calls), len(vlm.score_calls)) == (1, 1)
    generator, scored = np.random.default_rng(0), 0
    for _ in range(60):
        vlm.encode_calls.clear()
        vlm.score_calls.clear()
        actions = np.array([generator.choice(np.flatnonzero(mask)) for mask in envs.action_masks()])
        _, _, terminated, _, _ = envs.step(actions)
        ended = int(terminated.sum())
        asked = (4 if dense else ended) + ended  # what was selected, and the new examples with all tokens
        assert vlm.encode_calls == ([ended] if ended else [])
        assert vlm.score_calls == ([(asked, 1, 16)] if asked else [])
        scored += asked
    assert scored > 0


def test_memory_grows_with_what_is_cached_and_not_with_episodes() -> None:
    def alive(kind: type) -> int:
        return sum(type(thing) is kind for thing in gc.get_objects())

    gc.collect()
    before = {kind: alive(kind) for kind in (Instance, Episode, Encoded)}
    envs = make_vector(3, task=FakeTask(10**9), max_tokens=16, cache_size=5)
    envs.reset(seed=0)
    seen = set()
    for step in range(80):
        _, _, _, _, infos = envs.step(np.full(3, step % 16))
        seen |= set(infos.get("index", []))
    del infos
    gc.collect()
    assert len(seen) > 40
    # in memory: the cache, what runs and what was drawn last
    assert alive(Instance) - before[Instance] <= 5 + 3 + 3
    assert alive(Episode) - before[Episode] <= 3 + 3
    assert alive(Encoded) - before[Encoded] <= 5 + 3 + 3


def test_vector_actions_that_are_no_indices_are_refused_and_change_nothing() -> None:
    envs = make_vector(2)
    envs.reset(seed=0)
    for actions, message in (
        (np.array([0, 16]), "action 16 is out of range"),
        (np.array(3), r"shape \(\), expected \(2,\).*for each environment"),
        (np.zeros((2, 16), dtype=int), r"shape \(2, 16\), expected \(2,\)"),
        (np.array([0.0, 1.0]), "float64"),
    ):
        with pytest.raises(ValueError, match=message):
            envs.step(actions)
    observations, _, _, _, infos = envs.step([1, 2])
    assert indices(infos["kept"]) == [[1], [2]]
    observations["selected"].fill(1)
    envs.action_masks().fill(False)
    assert indices(envs.step([3, 4])[-1]["kept"]) == [[1, 3], [2, 4]]


def test_actions_sampled_with_the_masks_are_legal() -> None:
    envs = make_vector(2)
    _, infos = envs.reset(seed=0)
    for _ in range(10):
        *_, infos = envs.step(envs.action_space.sample(mask=tuple(infos["action_mask"])))
        assert (infos.get("invalid_actions", np.zeros(2)) == 0).all()


def test_vector_frames_are_those_of_single_environments() -> None:
    envs = make_vector(2, render_mode="rgb_array")
    singles = [make(render_mode="rgb_array") for _ in range(2)]
    envs.reset(seed=0)
    for i, env in enumerate(singles):
        env.reset(seed=i)
    for step in range(5):
        frames = envs.render()
        assert frames is not None
        for frame, env in zip(frames, singles, strict=True):
            np.testing.assert_array_equal(frame, env.render())
        envs.step([step, 5])
        if step == 4:
            break
        for env, action in zip(singles, [step, 5], strict=True):
            env.step(action)


def test_a_reward_that_fails_leaves_every_episode_as_it_was() -> None:
    calls = []

    def moody(scores: Any, full: Any) -> torch.Tensor:
        calls.append(scores)
        if len(calls) == 1:
            raise RuntimeError("no reward today")
        return scores.log_likelihood

    envs = make_vector(2, reward=moody)
    envs.reset(seed=0)
    with pytest.raises(RuntimeError, match="no reward today"):
        envs.step([3, 5])
    assert envs.action_masks().all()
    assert indices(envs.step([3, 5])[-1]["kept"]) == [[3], [5]]
