"""An evaluation on a fixed list of examples is the same in every call, whatever the trainer does between the calls."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode
from stable_baselines3 import A2C, DQN
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

import grip_env
from tests.envs.test_specs import STAGED
from tests.fakes import FakeTask, FakeVLM

COMMON: dict[str, Any] = {"vlm": FakeVLM(), "task": FakeTask(40), "split": "test", "max_tokens": 16}
SCORES = {"action_mode": "scores", "budget": (0.05, 0.6)}
ONE = "GRIP/TokenSelection-v0"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "scores": (ONE, SCORES),
    "binary": (ONE, {"budget": [0.1, 0.2]}),  # cut to k at random
    "sequential": ("GRIP/SequentialSelection-v0", {"budget": (0.1, 0.4)}),  # of different lengths
    "stages": ("GRIP/ProgressivePruning-v0", STAGED | {"action_mode": "scores", "budget": (0.3, 0.6)}),
    "small": ("GRIP/SmallSelection-v0", {"k": [1, 2], "table_cache": None}),
}


def make(case: str, examples: Any, **more: Any) -> gymnasium.Env[Any, Any]:
    name, own = CASES[case]
    common = {key: value for key, value in COMMON.items() if case not in ("small", "stages") or key != "max_tokens"}
    return gymnasium.make(name, **(common | own | {"examples": examples} | more))


def make_many(case: str, num_envs: int, examples: Any, **more: Any) -> Any:
    name, own = CASES[case]
    common = {key: value for key, value in COMMON.items() if case not in ("small", "stages") or key != "max_tokens"}
    return gymnasium.make_vec(name, num_envs, **(common | own | {"examples": examples} | more))


def doors(case: str, examples: int) -> dict[str, Any]:
    """Return what Stable-Baselines3 may evaluate on."""
    parts = [range(1, examples, 2), range(0, examples, 2)]
    return {
        "single": Monitor(make(case, examples)),
        "dummy": DummyVecEnv([lambda part=part: Monitor(make(case, part)) for part in parts]),  # type: ignore[misc]
        "native 1": VecMonitor(grip_env.as_sb3_vec_env(make_many(case, 1, examples))),
        "native 3": VecMonitor(grip_env.as_sb3_vec_env(make_many(case, 3, examples))),
    }


class Seen:
    """Notes which episodes an evaluation counts."""

    def __init__(self) -> None:
        self.indices: list[int] = []
        self.ks: dict[int, int] = {}

    def __call__(self, its: dict[str, Any], _: Any) -> None:
        if its["done"]:
            index = its["info"]["index"]
            self.indices.append(index)
            self.ks[index] = its["info"]["k"]


@pytest.mark.parametrize("case", CASES)
def test_every_evaluation_sees_each_example_once_and_means_are_equal(case: str) -> None:
    examples = 11
    options: dict[str, Any] = {"seed": 0, "device": "cpu"}
    sees, means = [], []
    for env in doors(case, examples).values():
        model: Any = (
            DQN("MultiInputPolicy", env, buffer_size=8, **options)  # repeats itself: lengths differ by budget
            if case == "sequential"
            else A2C("MultiInputPolicy", env, **options)
        )
        found, orders = [], []
        for _ in range(3):
            seen = Seen()
            found.append(evaluate_policy(model, env, n_eval_episodes=examples, callback=seen))
            orders.append(seen.indices)
            sees.append(seen.ks)
        assert sorted(orders[0]) == list(range(examples))
        if case == "sequential" and isinstance(env, DummyVecEnv):  # episodes are cut off where the other ones end
            assert all(sorted(order) == sorted(orders[0]) for order in orders)
            assert np.array(found) == pytest.approx(np.array(found[:1] * 3), abs=1e-12)
        else:
            assert orders[0] == orders[1] == orders[2]
            assert found[0] == found[1] == found[2], "to the last bit"
        means.append(found[0][0])
    assert all(seen == sees[0] for seen in sees), "each example has its budget, however they are shared out"
    assert len(set(sees[0].values())) > 1 or case == "binary"
    assert means == pytest.approx([means[0]] * len(means), abs=1e-4)


@pytest.mark.parametrize("door", ["single", "native 3"])
def test_fewer_or_more_episodes_than_examples_are_the_same_in_every_call_too(door: str) -> None:
    env = doors("scores", 11)[door]
    model = A2C("MultiInputPolicy", env, seed=0, device="cpu")
    for episodes in (4, 22):
        orders = []
        for _ in range(3):
            seen = Seen()
            evaluate_policy(model, env, n_eval_episodes=episodes, callback=seen)
            orders.append(seen.indices)
        assert orders[0] == orders[1] == orders[2]


def test_eval_callback_compares_models_on_the_same_examples(tmp_path: Path) -> None:
    """A model that does not learn has one mean throughout; without ``examples`` it has others by luck."""

    def means(examples: int | None) -> set[float]:
        envs = VecMonitor(grip_env.as_sb3_vec_env(make_many("scores", 2, examples)))
        callback = EvalCallback(envs, n_eval_episodes=8, eval_freq=4, log_path=str(tmp_path), verbose=0)
        training = VecMonitor(grip_env.as_sb3_vec_env(make_many("scores", 2, None, split="train")))
        A2C("MultiInputPolicy", training, n_steps=4, learning_rate=0.0, seed=0, device="cpu").learn(32, callback)
        assert len(callback.evaluations_results) == 4
        return {float(np.mean(results)) for results in callback.evaluations_results}

    assert len(means(8)) == 1
    assert len(means(None)) > 1


def indices(env: Any, count: int) -> list[int]:
    """Play episodes to their ends, each followed by a reset without a seed; which came first and after each."""
    found = []
    for _ in range(count):
        found.append(env.unwrapped._episode.instance.index)
        while not env.step(env.action_space.sample())[2]:
            pass
        env.reset()
    return found


@pytest.mark.parametrize("case", ["scores", "sequential", "stages"])
def test_a_single_environment_goes_on_after_an_episode_and_begins_anew_otherwise(case: str) -> None:
    env = make(case, [5, 2, 7], budget=0.5)
    env.reset()
    assert indices(env, 5) == [5, 2, 7, 5, 2]
    assert env.reset()[1]["index"] == 5  # 7 had begun, and nothing was done in it
    assert indices(env, 2) == [5, 2]
    assert env.reset(seed=3)[1]["index"] == 5
    assert indices(env, 1) == [5]
    assert env.reset(options={"index": 9})[1]["index"] == 9
    assert indices(env, 3) == [9, 5, 2]
    for copied in (copy.deepcopy(env), pickle.loads(pickle.dumps(env))):
        assert indices(copied, 2) == [7, 5]


def test_an_outer_limit_does_not_begin_anew() -> None:
    env = make("sequential", 4, budget=0.5, max_episode_steps=2)  # k = 8
    found = [env.reset()[1]["index"]]
    for _ in range(5):
        env.step(0)
        assert env.step(1)[3]
        found.append(env.reset()[1]["index"])
    assert found == [0, 1, 2, 3, 0, 1]


def test_seeds_change_nothing_and_chance_depends_on_the_example() -> None:
    plays = []
    for seed in (None, 3, 4):
        env = make("binary", 6)
        play = []
        for episode in range(12):
            observation, info = env.reset(seed=seed if episode == 0 else None)
            play.append((observation["budget"].item(), info["index"], *env.step(np.ones(16, dtype=np.int8))[1:]))
        plays.append(play)
    assert data_equivalence(plays[0], plays[1], exact=True)
    assert data_equivalence(plays[0], plays[2], exact=True)
    assert data_equivalence(plays[0][:6], plays[0][6:], exact=True)
    kept = {tuple(np.flatnonzero(entry[-1]["kept"])) for entry in plays[0]}
    assert len(kept) > 3, "and it is not the same for all"


@pytest.mark.parametrize("case", CASES)
def test_many_share_the_examples_out_as_single_environments_with_their_parts(case: str) -> None:
    envs = make_many(case, 2, [8, 3, 5, 1, 9])
    singles = [make(case, part) for part in ([3, 1], [8, 5, 9])]
    rng = np.random.default_rng(0)
    observations, infos = envs.reset(seed=1)
    own = [env.reset() for env in singles]
    for _ in range(12):
        for i, (_observation, info) in enumerate(own):
            assert infos["index"][i] == info["index"]
            assert observations["budget"][i] == own[i][0]["budget"]
        envs.action_space.seed(int(rng.integers(100)))
        actions = envs.action_space.sample()
        observations, rewards, terminated, _, infos = envs.step(actions)
        for i, env in enumerate(singles):
            observation, reward, ended, _, info = env.step(actions[i])
            assert rewards[i] == pytest.approx(reward, abs=1e-4)
            assert terminated[i] == ended
            own[i] = env.reset() if ended else (observation, info)
    assert envs.reset()[1]["index"].tolist() == [3, 8]
    assert envs.reset(seed=[4, None])[1]["index"].tolist() == [3, 8]


def test_without_the_argument_nothing_is_fixed() -> None:
    env = make("scores", None)
    assert isinstance(env.unwrapped.rules.examples, type(None))  # type: ignore[attr-defined]
    env.reset(seed=0)
    assert indices(env, 4) != [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (0, "from 1 to 40"),
        (41, "from 1 to 40, as many as the split has; got 41"),
        (-1, "from 1 to 40"),
        (True, "how many, or a list"),
        (2.5, "how many, or a list"),
        ([], "how many, or a list"),
        ("all", "how many, or a list"),
        ([0, "1"], "how many, or a list"),
        ([0, 40], "no example 40: the split has 40, 0 to 39"),
        ([-1], "no example -1"),
    ],
)
def test_bad_lists_are_refused(examples: Any, message: str) -> None:
    kinds: tuple[Any, ...] = (grip_env.TokenSelectionEnv, grip_env.TokenSelectionVectorEnv)
    for kind in kinds:
        with pytest.raises(ValueError, match=message):
            kind(**COMMON, examples=examples)


def test_more_environments_than_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="3 environments cannot share 2 examples"):
        make_many("scores", 3, 2)
    assert make_many("scores", 3, np.array([4, 1, 2])).reset()[1]["index"].tolist() == [2, 1, 4]


def test_gymnasiums_own_vector_environment_goes_through_the_list_as_well() -> None:
    envs = gymnasium.make_vec(
        ONE, 1, "sync", vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP}, **(COMMON | SCORES | {"examples": 3})
    )
    for _ in range(2):
        found = [envs.reset()[1]["index"].item()]
        for _ in range(5):
            found.append(envs.step(envs.action_space.sample())[-1]["index"].item())
        assert found == [0, 1, 2, 0, 1, 2]
