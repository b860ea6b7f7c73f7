"""Compressed observations: smaller and alike, and nothing that is paid or done changes."""

from __future__ import annotations

import pickle
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3 import PPO

import grip_env
from grip_env.envs.core.features import Features
from tests.fakes import FakeTask, FakeVLM
from tests.vlms.decoder.test_staged_forward import build

MODELS: dict[str, Any] = {
    "GRIP/TokenSelection-v0": FakeVLM(),
    "GRIP/SequentialSelection-v0": FakeVLM(),
    "GRIP/ProgressivePruning-v0": build("llava"),
}
IDS = tuple(MODELS)
SMALL: dict[str, Any] = {"feature_dim": 3, "obs_dtype": "float16"}


def make(name: str, **options: Any) -> gymnasium.Env[Any, Any]:
    env: gymnasium.Env[Any, Any] = gymnasium.make(name, vlm=MODELS[name], task=FakeTask(), budget=0.25, **options)
    return env


def test_a_projection_keeps_inner_products() -> None:
    generator = np.random.default_rng(1)
    rows = generator.standard_normal((50, 4096)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    seen = Features(4096, 1024)(rows)
    # each is off by a normal number of standard deviation at most sqrt(2 / 1024)
    np.testing.assert_allclose(seen @ seen.T, rows @ rows.T, atol=5 * np.sqrt(2 / 1024))


def test_a_projection_is_the_same_wherever_it_is_made() -> None:
    rows = np.eye(6, dtype=np.float32)
    np.testing.assert_array_equal(Features(6, 4)(rows), Features(6, 4)(rows))
    np.testing.assert_array_equal(Features(6, 4)(rows), Features(6, 4).matrix)


def test_what_is_left_as_it_is_is_not_copied() -> None:
    rows = np.ones((5, 6), dtype=np.float32)
    assert Features(6)(rows) is rows


def test_numbers_beyond_float16_become_its_largest() -> None:
    seen = Features(2, dtype="float16")(np.array([[1e6, -1e6]], dtype=np.float32))
    assert seen.dtype == np.float16
    assert seen.tolist() == [[65504.0, -65504.0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_dim": 0}, "from 1 to 8, the width"),
        ({"feature_dim": 9}, "from 1 to 8, the width"),
        ({"obs_dtype": "bfloat16"}, "'float32' or 'float16'; got 'bfloat16'"),
    ],
)
def test_impossible_compressions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(IDS[0], **options)


@pytest.mark.parametrize("name", IDS)
@pytest.mark.filterwarnings("error")
def test_compressed_environments_pass_the_checker(name: str) -> None:
    check_env(make(name, **SMALL).unwrapped)


@pytest.mark.parametrize("name", IDS)
def test_only_tokens_and_words_change(name: str) -> None:
    plain, small = make(name), make(name, **SMALL)
    features = Features(MODELS[name].width, 3, "float16")
    (seen, info), (less, same) = (env.reset(seed=3) for env in (plain, small))
    done = False
    while not done:
        assert less["tokens"].dtype == less["question"].dtype == np.float16
        for key, value in seen.items():
            expected = features(value) if key in ("tokens", "question") else value
            np.testing.assert_array_equal(less[key], expected)
            assert small.observation_space[key].contains(less[key])  # type: ignore[index]
        np.testing.assert_equal(same, info)
        action = plain.action_space.sample(*([info["action_mask"]] if "action_mask" in info else []))
        seen, reward, done, _, info = plain.step(action)
        less, paid, *_, same = small.step(action)
        assert paid == reward


@pytest.mark.parametrize("name", IDS)
def test_the_vector_environment_compresses_likewise(name: str) -> None:
    options: dict[str, Any] = {"vlm": MODELS[name], "task": FakeTask(), "budget": 0.25, **SMALL}
    envs: Any = gymnasium.make_vec(name, num_envs=2, **options)
    singles = [gymnasium.make(name, **options) for _ in range(2)]
    rows, _ = envs.reset(seed=5)
    own = [env.reset(seed=5 + row)[0] for row, env in enumerate(singles)]
    actions = np.ones(envs.action_space.shape, dtype=envs.action_space.dtype)
    for step in range(2):
        assert rows in envs.observation_space
        assert rows["tokens"].shape == (2, envs.unwrapped.rules.max_tokens, 3)
        for row, seen in enumerate(own):
            # batches sum hidden states in another order, which may end in the next number of float16
            np.testing.assert_allclose(rows["tokens"][row], seen["tokens"], rtol=2e-3, atol=1e-5)
        if step == 0:
            rows, _, terminated, _, _ = envs.step(actions)
            own = [env.step(action)[0] for env, action in zip(singles, actions, strict=True)]
            if terminated.any():  # the next episodes have begun
                own = [env.reset()[0] for env in singles]


@pytest.mark.parametrize("name", IDS)
def test_a_compressed_environment_pickles(name: str) -> None:
    env = make(name, **SMALL)
    seen, _ = env.reset(seed=0)
    np.testing.assert_equal(pickle.loads(pickle.dumps(env)).reset(seed=0)[0], seen)


def test_a_rollout_buffer_of_stable_baselines3_is_as_small_as_the_observations() -> None:
    envs = gymnasium.make_vec(IDS[1], num_envs=2, vlm=FakeVLM(), task=FakeTask(), **SMALL)
    model = PPO("MultiInputPolicy", grip_env.as_sb3_vec_env(envs), n_steps=8, batch_size=8, device="cpu")
    model.learn(16)
    held: Any = model.rollout_buffer.observations
    assert held["tokens"].nbytes == 8 * 2 * 16 * 3 * 2
