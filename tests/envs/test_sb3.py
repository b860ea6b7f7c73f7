from __future__ import annotations

import csv
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import data_equivalence
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor, VecNormalize

import grip_env
from grip_env.envs.sb3 import as_sb3_vec_env
from grip_env.envs.selection import TokenSelectionEnv, TokenSelectionVectorEnv
from grip_env.envs.sequential import SequentialSelectionEnv, SequentialSelectionVectorEnv
from tests.fakes import FakeTask, FakeVLM, indices

DEFAULTS: dict[str, Any] = {"task": FakeTask(), "budget": (0.1, 0.6), "max_tokens": 16}


def make(kind: Any = SequentialSelectionVectorEnv, num_envs: int = 3, **arguments: Any) -> Any:
    return as_sb3_vec_env(kind(num_envs, **({"vlm": FakeVLM()} | DEFAULTS | arguments)))


class Infos(BaseCallback):
    """Collects what the environments say in training."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        self.seen += self.locals["infos"]
        return True


# -- the interface ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("GRIP/SequentialSelection-v0", {}),
        ("GRIP/SequentialSelection-v0", {"dense": False, "task": FakeTask(relevance=False), "max_episode_steps": 4}),
        ("GRIP/TokenSelection-v0", {"action_mode": "binary", "over_budget_penalty": 0.1}),
        ("GRIP/TokenSelection-v0", {"action_mode": "scores", "question_aware": False}),
    ],
    ids=["sequential", "limit", "binary", "scores"],
)
def test_equals_stable_baselines_own_vec_env_of_single_environments(name: str, arguments: dict[str, Any]) -> None:
    vlm = FakeVLM(count=lambda example: 16 - 3 * (len(example.question) % 3))
    kwargs = DEFAULTS | {"vlm": vlm} | arguments
    ours = as_sb3_vec_env(gymnasium.make_vec(name, num_envs=3, **kwargs))
    theirs = DummyVecEnv([lambda: gymnasium.make(name, **kwargs)] * 3)
    assert isinstance(ours, VecEnv)
    assert (ours.num_envs, ours.render_mode) == (theirs.num_envs, theirs.render_mode) == (3, None)
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    assert ours.seed(5) == theirs.seed(5) == [5, 6, 7]
    assert data_equivalence(ours.reset(), dict(theirs.reset()))
    assert data_equivalence(ours.reset_infos, theirs.reset_infos)
    ours.action_space.seed(0)
    ends = truncated = 0
    for _ in range(60):
        actions = np.stack([ours.action_space.sample() for _ in range(3)])
        (seen, rewards, dones, infos), expected = ours.step(actions), theirs.step(actions)
        assert data_equivalence((seen, rewards, dones, infos), (dict(expected[0]), *expected[1:]))
        assert data_equivalence(ours.reset_infos, theirs.reset_infos)
        assert rewards.dtype == np.float32
        for mine, other in zip(infos, expected[3], strict=True):  # no NumPy numbers where there were Python's
            assert {key: type(value) for key, value in mine.items()} == {
                key: type(value) for key, value in other.items()
            }
        ends += dones.sum()
        truncated += sum(info["TimeLimit.truncated"] for info in infos)
    assert ends > 20
    assert (truncated > 0) == ("max_episode_steps" in arguments)
    theirs.set_options({"budget": 0.5})
    ours.set_options({"budget": 0.5})
    assert data_equivalence(ours.reset(), dict(theirs.reset()))
    assert [info["k"] for info in ours.reset_infos] == [info["k"] for info in theirs.reset_infos]
    theirs.reset()  # options and seeds count once
    ours.reset()
    assert data_equivalence(ours.reset_infos, theirs.reset_infos)


def test_options_can_differ_between_instances() -> None:
    envs = make()
    envs.set_options([{"index": 4}, {"budget": 0.25, "index": 2}, {}])
    envs.reset()
    assert [info["index"] for info in envs.reset_infos[:2]] == [4, 2]
    assert envs.reset_infos[1]["k"] == 4


def test_ends_carry_the_final_info_and_observation() -> None:
    envs = make(budget=0.125)  # k = 2
    envs.seed(0)
    envs.reset()
    envs.step(np.array([1, 2, 2]))
    seen, _, dones, infos = envs.step(np.array([3, 2, 4]))
    assert dones.tolist() == [True, False, True]
    assert indices(infos[0]["kept"]) == [1, 3]
    assert isinstance(infos[0]["log_likelihood"], float)
    assert infos[0]["correct"].dtype == bool
    assert np.flatnonzero(infos[0]["terminal_observation"]["selected"]).tolist() == [1, 3]
    assert {key: value.shape for key, value in infos[0]["terminal_observation"].items()} == {
        key: space.shape for key, space in envs.observation_space.spaces.items()
    }
    assert "terminal_observation" not in infos[1]
    assert infos[1]["invalid_actions"] == 1
    assert not any(info["TimeLimit.truncated"] for info in infos)
    assert seen["selected"].sum(1).tolist() == [0, 1, 0]
    assert not any("final" in key for info in infos for key in info)


def test_returned_arrays_are_copies() -> None:
    envs = make(num_envs=2)
    envs.seed(0)
    first = envs.reset()
    for value in first.values():
        value.fill(1)
    envs.reset_infos[0]["action_mask"].fill(0)
    assert all(mask.all() for mask in envs.env_method("action_masks"))
    second, _, _, infos = envs.step(np.array([3, 3]))
    assert second["selected"].sum() == 2
    infos[0]["action_mask"].fill(0)
    assert envs.env_method("action_masks")[0].sum() == 15


def test_one_call_of_the_model_per_step() -> None:
    vlm = FakeVLM()
    envs = make(TokenSelectionVectorEnv, 4, vlm=vlm, task=FakeTask(10**9))
    envs.reset()
    for step in range(1, 5):
        envs.step(np.zeros((4, 16), dtype=np.int8))
        assert (len(vlm.encode_calls), len(vlm.score_calls)) == (1 + step, 1 + step)


def test_attributes_and_methods_are_found() -> None:
    envs = make(max_episode_steps=7)
    envs.seed(3)
    envs.reset()
    assert envs.has_attr("action_masks")
    assert not make(TokenSelectionVectorEnv).has_attr("action_masks")
    assert not envs.has_attr("nonsense")
    assert envs.get_attr("max_episode_steps") == [7, 7, 7]
    assert envs.get_attr("np_random_seed") == [3, 4, 5]
    assert envs.get_attr("np_random_seed", [2, 0]) == [5, 3]
    assert envs.get_attr("num_envs", 1) == [3]
    envs.step(np.array([1, 2, 3]))
    masks = envs.env_method("action_masks", indices=[2, 0])
    assert [np.flatnonzero(~mask).tolist() for mask in masks] == [[3], [1]]
    assert envs.env_is_wrapped(Monitor) == [False] * 3
    assert envs.env_is_wrapped(Monitor, 0) == [False]
    envs.set_attr("max_episode_steps", 9)
    assert envs.envs.max_episode_steps == 9
    with pytest.raises(ValueError, match=r"max_episode_steps.*leave out indices"):
        envs.set_attr("max_episode_steps", 1, indices=[0])
    assert envs.envs.max_episode_steps == 9
    with pytest.raises(AttributeError, match="nonsense"):
        envs.get_attr("nonsense")
    with pytest.raises(AttributeError, match="action_masks, render"):
        envs.env_method("reset")


def test_what_stable_baselines_cannot_train_on_is_refused() -> None:
    kwargs = {"vlm": FakeVLM()} | DEFAULTS
    with pytest.raises(TypeError, match="SequentialSelectionEnv: Stable-Baselines3 takes a single"):
        as_sb3_vec_env(SequentialSelectionEnv(**kwargs))  # type: ignore[arg-type]
    sync = gymnasium.make_vec("GRIP/TokenSelection-v0", num_envs=2, vectorization_mode="sync", **kwargs)
    with pytest.raises(ValueError, match=r"SAME_STEP.*NEXT_STEP"):
        as_sb3_vec_env(sync)
    with pytest.raises(RuntimeError, match="step_async"):
        make().step_wait()


def test_wrapped_vector_environments_are_taken_as_they_are() -> None:
    inner = SequentialSelectionVectorEnv(2, vlm=FakeVLM(), **DEFAULTS)
    envs = as_sb3_vec_env(gymnasium.wrappers.vector.TransformReward(inner, lambda rewards: rewards * 0 + 7))
    envs.reset()
    assert envs.has_attr("action_masks")
    assert envs.step(np.array([0, 1]))[1].tolist() == [7.0, 7.0]


def test_episode_statistics_of_gymnasium_reach_stable_baselines() -> None:
    inner = SequentialSelectionVectorEnv(2, vlm=FakeVLM(), **DEFAULTS | {"budget": [0.125, 0.25]})
    envs = as_sb3_vec_env(gymnasium.wrappers.vector.RecordEpisodeStatistics(inner))
    envs.set_options([{"budget": 0.125}, {"budget": 0.25}])
    envs.reset()
    totals = np.zeros(2)
    for step in range(2):
        _, rewards, dones, infos = envs.step(np.full(2, step))
        totals += rewards
    assert dones.tolist() == [True, False]
    assert infos[0]["episode"]["l"] == 2
    assert infos[0]["episode"]["r"] == pytest.approx(totals[0])
    assert "episode" not in infos[1]
    assert "episode" not in envs.reset_infos[0]


def test_frames_are_of_one_size_and_tiled() -> None:
    class Ragged(FakeTask):
        def example(self, split: str, index: int) -> Any:
            example = super().example(split, index)
            object.__setattr__(example, "question", example.question * (1 + 5 * (index % 2)))
            return example

    envs = make(num_envs=2, task=Ragged(), render_mode="rgb_array", max_question_tokens=64)
    envs.set_options([{"index": 0}, {"index": 1}])  # a short question and a long one
    envs.reset()
    small, large = envs.get_images()
    assert small.shape == large.shape
    picture = envs.render()
    assert picture.shape == (small.shape[0] * 2, small.shape[1], 3)
    frames = envs.envs.render()
    for image, frame in zip((small, large), frames, strict=True):
        np.testing.assert_array_equal(image, frame)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert make().get_images() == [None] * 3


def test_importing_the_project_does_not_load_stable_baselines() -> None:
    code = "import sys, grip_env; print('stable_baselines3' in sys.modules, grip_env.as_sb3_vec_env.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "as_sb3_vec_env"]
    assert grip_env.as_sb3_vec_env is as_sb3_vec_env


# -- training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [PPO, A2C])
@pytest.mark.parametrize("mode", ["binary", "scores"])
def test_stable_baselines_trains_on_the_one_shot_environment(algorithm: Any, mode: str) -> None:
    envs = VecMonitor(make(TokenSelectionVectorEnv, 8, action_mode=mode))
    sizes = {"batch_size": 32, "n_epochs": 2} if algorithm is PPO else {}
    model = algorithm("MultiInputPolicy", envs, n_steps=4, seed=0, device="cpu", **sizes)
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    callback = Infos()
    model.learn(256, callback=callback)
    assert model.num_timesteps == 256
    assert any(not torch.equal(before[name], value) for name, value in model.policy.state_dict().items())
    assert len(callback.seen) == 256
    assert all(info["episode"]["l"] == 1 and "log_likelihood" in info for info in callback.seen)
    mean, _ = evaluate_policy(model, envs, n_eval_episodes=16)
    assert np.isfinite(mean)


def test_maskable_ppo_learns_which_tokens_matter() -> None:
    from sb3_contrib import MaskablePPO

    envs = VecMonitor(make(num_envs=16, budget=0.125, task=FakeTask(1), question_aware=False))
    model = MaskablePPO(
        "MultiInputPolicy", envs, n_steps=8, batch_size=64, gamma=1.0, learning_rate=3e-3, seed=0, device="cpu"
    )
    callback = Infos()
    model.learn(2048, callback=callback)
    assert all(info["invalid_actions"] == 0 for info in callback.seen)
    returns = [info["episode"]["r"] for info in callback.seen if "episode" in info]
    assert len(returns) == 1024
    assert {info["episode"]["l"] for info in callback.seen if "episode" in info} == {2}
    # two of three tokens that matter, against two at random
    best = -2.0 + 1.9 * 2 / 3 - (-2.0 + 1.9 - 0.013)
    assert np.mean(returns[-128:]) > best - 0.2
    assert np.mean(returns[:128]) < best - 0.6


def test_monitor_writes_returns_lengths_and_chosen_infos(tmp_path: Path) -> None:
    path = tmp_path / "monitor.csv"
    envs = VecMonitor(make(budget=0.25), str(path), info_keywords=("log_likelihood", "correct"))
    envs.seed(0)
    envs.reset()
    full = [info["full_log_likelihood"] for info in envs.venv.reset_infos]  # type: ignore[attr-defined]
    ends = []
    for step in range(4):
        _, _, _, infos = envs.step(np.full(3, step))
        ends += [info for info in infos if "episode" in info]
    envs.close()
    assert [info["episode"]["l"] for info in ends] == [4, 4, 4]
    for info, everything in zip(ends, full, strict=True):  # dense rewards add up to the difference
        assert info["episode"]["r"] == pytest.approx(info["log_likelihood"] - everything, abs=1e-5)
    rows = list(csv.DictReader(path.read_text().splitlines()[1:]))
    assert [float(row["log_likelihood"]) for row in rows] == [info["log_likelihood"] for info in ends]
    assert {row["correct"] for row in rows} <= {"True", "False"}


def test_a_limit_is_bootstrapped_from_the_terminal_observation() -> None:
    envs = make(budget=0.5, max_episode_steps=3)  # k = 8
    model = A2C("MultiInputPolicy", envs, n_steps=6, gamma=1.0, seed=0, device="cpu")
    asked = []
    original = model.policy.predict_values
    model.policy.predict_values = lambda seen: asked.append(seen) or original(seen)  # type: ignore[method-assign,func-returns-value]
    model.learn(18)
    bootstrapped = [seen for seen in asked if len(seen["selected"]) == 1]
    assert len(bootstrapped) == 6  # three instances, each cut twice
    assert all(1 <= int(seen["selected"].sum()) <= 3 for seen in bootstrapped)


def test_other_wrappers_of_stable_baselines_go_on_top() -> None:
    envs = VecNormalize(make(), norm_obs=True, norm_obs_keys=["tokens"])
    envs.reset()
    for step in range(5):
        seen, rewards, _, _ = envs.step(np.full(3, step))
        assert np.isfinite(rewards).all()
    assert np.isfinite(seen["tokens"]).all()


def test_single_and_vector_training_runs_are_the_same() -> None:
    """The same seeds and the same network see the same episodes, whichever way they are stepped."""
    weights = []
    for vectorised in (True, False):
        kwargs = {"vlm": FakeVLM(), "action_mode": "scores"} | DEFAULTS
        envs: VecEnv = (
            as_sb3_vec_env(TokenSelectionVectorEnv(4, **kwargs))
            if vectorised
            else DummyVecEnv([lambda kwargs=kwargs: TokenSelectionEnv(**kwargs)] * 4)  # type: ignore[misc]
        )
        model = A2C("MultiInputPolicy", envs, n_steps=4, seed=0, device="cpu")
        model.learn(64)
        weights.append(torch.cat([value.flatten() for value in model.policy.state_dict().values()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)
