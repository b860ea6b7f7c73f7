from __future__ import annotations

import inspect
import itertools
import math
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import grip_env
from grip_env.envs.selection import TokenSelectionEnv
from grip_env.envs.small import SmallSelectionEnv, SmallSelectionVectorEnv
from grip_env.tasks.scenes import SceneTask
from tests.fakes import INFO_KEYS, WIDTH, FakeTask, FakeVLM, expected_log_likelihood, indices


def make(**arguments: Any) -> SmallSelectionEnv:
    """Blocks of one token each by default, so that results are easy to know by hand."""
    defaults: dict[str, Any] = {"vlm": FakeVLM(), "task": FakeTask(), "k": 2}
    return SmallSelectionEnv(**(defaults | arguments))


def binary(*chosen: int, count: int = 16) -> np.ndarray:
    action = np.zeros(count, dtype=np.int8)
    action[list(chosen)] = 1
    return action


# -- the interface ---------------------------------------------------------------------------------------


def test_spaces_are_over_blocks() -> None:
    env = make(vlm=FakeVLM(12), grid=(4, 6), k=3, action_mode="scores")
    observation, info = env.reset(seed=0)
    assert observation in env.observation_space
    assert observation["tokens"].shape == (24, WIDTH)
    np.testing.assert_allclose(observation["positions"][7], [1.5 / 4, 1.5 / 6])
    assert observation["budget"] == np.float32(3 / 24)
    assert info["k"] == 3
    assert env.action_space.shape == (24,)


@pytest.mark.parametrize("enumerate", [True, False])
def test_info_has_the_documented_keys_and_never_nan(enumerate: bool) -> None:
    env = make(enumerate=enumerate)
    _, start = env.reset(seed=0)
    _, _, terminated, truncated, end = env.step(binary(1, 2))
    assert (terminated, truncated) == (True, False)
    known = {"optimal_reward", "optimality_gap", "percentile"} if enumerate else set()
    assert set(start) == set(end) == INFO_KEYS | known | {"over_budget", "under_budget"}
    assert not any(start[key] for key in known | {"scored", "log_likelihood", "under_budget"})
    values = [value for info in (start, end) for value in info.values() if isinstance(value, float)]
    assert not any(math.isnan(value) for value in values)
    assert all(end[key].dtype == float for key in known)


# -- exactly k -------------------------------------------------------------------------------------------


def test_exactly_k_are_kept_whatever_is_chosen() -> None:
    env = make(k=4)
    generator = np.random.default_rng(0)
    for count in range(17):
        chosen = set(generator.choice(16, count, replace=False).tolist())
        env.reset(seed=count)
        _, _, _, _, info = env.step(binary(*chosen))
        kept = set(indices(info["kept"]))
        assert len(kept) == info["k"] == 4
        assert kept <= chosen if count >= 4 else chosen < kept
        assert info["over_budget"] == max(0, count - 4)
        assert info["under_budget"] == max(0, 4 - count)


def test_missing_blocks_are_filled_in_uniformly_and_follow_the_seed() -> None:
    counts, first = np.zeros(16), []
    for _ in range(2):
        env = make(k=3)
        env.reset(seed=1)
        counts[:], kept = 0, []
        for _ in range(300):
            kept.append(indices(env.step(binary(5))[-1]["kept"]))
            counts[kept[-1]] += 1
            env.reset(options={"index": 2})
        first.append(kept)
    assert first[0] == first[1]
    assert counts[5] == 300
    np.testing.assert_allclose(np.delete(counts, 5) / 300, 2 / 15, atol=0.08)  # four standard deviations


def test_scores_keep_the_best_k() -> None:
    env = make(k=3, action_mode="scores")
    env.reset(seed=0)
    scores = np.zeros(16)
    scores[[9, 2, 11]] = 1.0, 0.5, 0.7
    info = env.step(scores)[-1]
    assert indices(info["kept"]) == [2, 9, 11]
    assert (info["over_budget"], info["under_budget"]) == (0, 0)


def test_blocks_without_tokens_are_never_kept() -> None:
    env = make(vlm=FakeVLM(count=lambda example: 6), k=4)
    observation, start = env.reset(seed=0)
    assert observation["token_mask"].tolist() == [1] * 6 + [0] * 10
    assert observation["budget"] == np.float32(4 / 6)
    info = env.step(binary(15))[-1]
    assert max(indices(info["kept"])) < 6
    assert len(indices(info["kept"])) == start["k"] == info["under_budget"] == 4
    env = make(vlm=FakeVLM(count=lambda example: 3), k=4)
    env.reset(seed=0)
    info = env.step(binary())[-1]
    assert (indices(info["kept"]), info["k"], info["optimality_gap"], info["percentile"]) == ([0, 1, 2], 3, 0.0, 0.5)


# -- the optimum -----------------------------------------------------------------------------------------


def test_optimum_is_that_of_brute_force() -> None:
    env = make(k=3)
    _, start = env.reset(options={"index": 3})
    full = expected_log_likelihood(range(16), indices(start["relevant"]))
    rewards = [
        expected_log_likelihood(kept, indices(start["relevant"])) - full
        for kept in itertools.combinations(range(16), 3)
    ]
    for kept in ([0, 1, 2], sorted(indices(start["relevant"])), [indices(start["relevant"])[0], 0, 15]):
        env.reset(options={"index": 3})
        _, reward, _, _, info = env.step(binary(*kept))
        assert indices(info["kept"]) == sorted(kept)
        assert info["optimal_reward"] == pytest.approx(max(rewards), abs=1e-6)
        assert info["optimality_gap"] == pytest.approx(max(rewards) - float(reward), abs=1e-6)
        assert (info["optimality_gap"] == 0) == (set(kept) == set(indices(start["relevant"])))


def test_percentiles_of_all_actions_average_one_half() -> None:
    env = make(k=2, grid=(2, 2))
    found = []
    for pair in itertools.combinations(range(4), 2):
        env.reset(options={"index": 1})
        _, reward, _, _, info = env.step(binary(*pair, count=4))
        found.append((float(reward), info["percentile"], info["optimality_gap"]))
    assert np.mean([percentile for _, percentile, _ in found]) == pytest.approx(0.5)
    assert min(gap for *_, gap in found) == 0.0
    best, worst = max(found), min(found)
    assert best[1] == max(percentile for _, percentile, _ in found)
    assert worst[1] == min(percentile for _, percentile, _ in found)


def test_penalties_are_no_part_of_the_optimum() -> None:
    infos, rewards = [], []
    for penalty in (0.0, 5.0):
        env = make(k=2, over_budget_penalty=penalty)
        env.reset(seed=0)
        _, reward, _, _, info = env.step(binary(1, 2, 3))
        infos.append(info)
        rewards.append(float(reward))
    assert data_equivalence(infos[0], infos[1], exact=True)
    assert rewards[0] - rewards[1] == pytest.approx(5.0)


def test_looking_the_optimum_up_changes_no_episode() -> None:
    known, unknown = make(k=[1, 3]), make(k=[1, 3], enumerate=False)
    for step in range(12):
        seed = 4 if step == 0 else None
        (seen, start), (same, without) = known.reset(seed=seed), unknown.reset(seed=seed)
        assert data_equivalence((seen, {key: start[key] for key in without}), (same, without))
        action = binary(*range(step))
        one, other = known.step(action), unknown.step(action)
        assert one[1] == other[1]
        assert data_equivalence({key: one[-1][key] for key in other[-1]}, other[-1], exact=True)


def test_a_table_is_made_once_for_an_instance_and_k() -> None:
    vlm = FakeVLM()
    env = make(vlm=vlm, k=[1, 2])

    def scored(index: int, k: int) -> list[int]:
        env.reset(options={"index": index, "k": k})
        before = len(vlm.score_calls)
        env.step(binary(0))
        return [shape[1] for shape in vlm.score_calls[before:]]

    assert scored(0, 1) == [1, 16]
    assert scored(0, 1) == [1]
    assert scored(0, 2) == [1, 120]
    assert scored(1, 2) == [1, 120]
    assert scored(0, 2) == scored(0, 1) == [1]
    env = make(vlm=vlm, cache_size=0)
    assert scored(0, 2) == scored(0, 2) == [1, 120]


def test_tables_survive_on_disk_with_the_same_numbers(tmp_path: Path) -> None:
    class KnownVLM(FakeVLM):
        def fingerprint(self) -> str:
            return "known"

    def rollout(vlm: FakeVLM, where: Any) -> list[Any]:
        env = make(vlm=vlm, table_cache=where, k=2)
        return [(env.reset(options={"index": i}, seed=0), env.step(binary(3)))[1] for i in range(3)]

    folder, reader = tmp_path / "tables", KnownVLM()
    plain, first, second = rollout(FakeVLM(), None), rollout(KnownVLM(), folder), rollout(reader, folder)
    assert data_equivalence(plain, first, exact=True)
    assert data_equivalence(first, second, exact=True)
    assert max(shape[1] for shape in reader.score_calls) == 1
    assert len(list(folder.rglob("*.safetensors"))) == 3


def test_the_embedded_model_has_a_known_optimum(tmp_path: Path) -> None:
    env = gymnasium.make("GRIP/SmallSelection-v0", split="validation", k=1, action_mode="scores", table_cache=tmp_path)
    _, start = env.reset(options={"index": 1})
    example = SceneTask().example("validation", 1)
    assert example.relevance is not None
    cells = np.argwhere(example.relevance > 0) // 3
    assert set(indices(start["relevant"])) == {int(4 * row + column) for row, column in cells}
    rewards, gaps = [], []
    for block in range(16):
        env.reset(options={"index": 1})
        _, reward, _, _, info = env.step(np.eye(16)[block])
        assert indices(info["kept"]) == [block]
        assert info["optimality_gap"] == pytest.approx(info["optimal_reward"] - float(reward), abs=1e-4)
        rewards.append(float(reward))
        gaps.append(info["optimality_gap"])
    assert info["optimal_reward"] == pytest.approx(max(rewards), abs=1e-4)
    assert int(np.argmin(gaps)) in indices(start["relevant"])
    assert max(gaps) > 0.5


# -- options and misuse ----------------------------------------------------------------------------------


def test_options_fix_index_and_k() -> None:
    env = make(k=[1, 2, 3])
    _, info = env.reset(seed=0, options={"index": 7, "k": 5})
    assert (info["index"], info["k"]) == (7, 5)
    ks = [env.reset()[1]["k"] for _ in range(60)]
    assert set(ks) == {1, 2, 3}
    with pytest.raises(ValueError, match=r"\['budget'\]: the options are index, k"):
        env.reset(options={"budget": 0.5})
    with pytest.raises(ValueError, match="from 1 to 16; got 17"):
        env.reset(options={"k": 17})
    with pytest.raises(IndexError, match="0 to 9"):
        env.reset(options={"index": 10, "k": 1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "how many of the 16 blocks to keep, from 1 to 16; got 0"),
        ({"k": 17}, "got 17"),
        ({"k": 0.25}, r"got 0\.25"),
        ({"k": (2, 4)}, r"got \(2, 4\)"),
        ({"k": []}, "list of k is empty"),
        ({"k": [2, 20]}, "got 20"),
        ({"grid": (0, 4)}, "at least one row and one column; got 0 x 4"),
        ({"k": 6, "grid": (4, 6)}, r"C\(24, 6\) = 134,596 .* enumerate=False"),
        ({"grid": (10, 10)}, "at most 64.*enumerate=False"),
        ({"action_mode": "sequential"}, "'binary' or 'scores'"),
        ({"table_cache": "/tmp"}, r"fake has no fingerprint\(\)"),
        ({"render_mode": "ascii"}, "render_mode"),
    ],
)
def test_bad_arguments_are_refused_with_the_fix(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_any_size_goes_without_the_optimum() -> None:
    env = make(vlm=FakeVLM(12), k=50, grid=(10, 10), enumerate=False)
    env.reset(seed=0)
    assert len(indices(env.step(binary(count=100))[-1]["kept"])) == 50


def test_pictures_show_blocks() -> None:
    env = make(render_mode="rgb_array", grid=(2, 2), k=1)
    env.reset(seed=0)
    env.step(binary(3, count=4))
    frame = env.render()
    assert frame is not None
    light = frame[:480, :480].astype(float).mean(-1)
    assert light[260:460, 260:460].mean() > 2 * light[20:220, 20:220].mean()


# -- many at once ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("action_mode", ["binary", "scores"])
def test_equals_single_environments_run_in_turn(action_mode: str) -> None:
    vlm = FakeVLM(count=lambda example: 16 - len(example.question) % 3)
    settings: dict[str, Any] = {"task": FakeTask(), "k": [1, 3], "action_mode": action_mode}
    ours = SmallSelectionVectorEnv(3, vlm=vlm, **settings)
    theirs: SyncVectorEnv = SyncVectorEnv(
        [lambda: SmallSelectionEnv(vlm=vlm, **settings)] * 3, autoreset_mode=AutoresetMode.SAME_STEP
    )
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    assert data_equivalence(ours.reset(seed=7), theirs.reset(seed=7))
    theirs.action_space.seed(0)
    for _ in range(8):
        actions = theirs.action_space.sample()
        found, expected = ours.step(actions), theirs.step(actions)
        assert data_equivalence(found, expected)
    assert {"optimal_reward", "optimality_gap", "percentile", "under_budget"} <= set(found[-1]["final_info"])
    _, infos = ours.reset(options={"k": [1, 2, 3], "index": 4})
    assert infos["k"].tolist() == [1, 2, 3]


def test_environments_take_the_same_arguments() -> None:
    single = dict(inspect.signature(SmallSelectionEnv).parameters)
    vector = dict(inspect.signature(SmallSelectionVectorEnv).parameters)
    assert vector.pop("num_envs").default == 1
    assert vector.pop("max_episode_steps").default is None
    assert vector.pop("autoreset_mode").default is AutoresetMode.SAME_STEP
    assert single == vector
    large = dict(inspect.signature(TokenSelectionEnv).parameters)
    own = {"k", "grid", "enumerate", "table_cache"}
    assert set(single) - own == set(large) - {"budget", "max_tokens"}
    assert all(single[name].default == large[name].default for name in set(single) - own)
    assert grip_env.SmallSelectionEnv is SmallSelectionEnv


def test_k_may_come_from_numpy_but_not_be_a_bool() -> None:
    env = make(k=np.int64(2))
    assert env.reset(seed=0)[1]["k"] == 2
    with pytest.raises(ValueError, match="k is how many"):
        make(k=True)
