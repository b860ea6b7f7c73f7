from __future__ import annotations

import inspect
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from grip_env.envs.selection import TokenSelectionEnv, TokenSelectionVectorEnv
from grip_env.vlms.base import Encoded
from tests.fakes import FakeTask, FakeVLM, expected_log_likelihood, indices

DEFAULTS: dict[str, Any] = {"task": FakeTask(), "budget": (0.1, 0.6)}


def make(num_envs: int = 3, **arguments: Any) -> TokenSelectionVectorEnv:
    return TokenSelectionVectorEnv(num_envs, **({"vlm": FakeVLM()} | DEFAULTS | arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"action_mode": "scores", "question_aware": False, "budget": [0.25, 0.5]},
        {"task": FakeTask(relevance=False), "over_budget_penalty": 0.1, "cache_size": 1, "budget": 0.2},
    ],
    ids=["binary", "scores", "penalty"],
)
def test_equals_single_environments_run_in_turn(arguments: dict[str, Any]) -> None:
    settings = DEFAULTS | {"max_tokens": 16} | arguments
    vlm = FakeVLM(count=lambda example: 16 - len(example.question) % 3)  # sizes differ
    ours = TokenSelectionVectorEnv(3, vlm=vlm, **settings)
    theirs: SyncVectorEnv = SyncVectorEnv(
        [lambda: TokenSelectionEnv(vlm=vlm, **settings)] * 3, autoreset_mode=AutoresetMode.SAME_STEP
    )
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    assert data_equivalence(ours.reset(seed=7), theirs.reset(seed=7))
    theirs.action_space.seed(0)
    for _ in range(12):  # beyond one pass through the ten examples
        actions = theirs.action_space.sample()
        assert data_equivalence(ours.step(actions), theirs.step(actions))
    assert ours.np_random_seed == theirs.np_random_seed == (7, 8, 9)
    # without a seed both go on, with a list each environment is seeded by its own
    assert data_equivalence(ours.reset(), theirs.reset())
    seeds: list[int | None] = [3, None, 3]
    found, expected = ours.reset(seed=seeds), theirs.reset(seed=list(seeds))
    assert data_equivalence(found, expected)
    assert found[1]["index"][0] == found[1]["index"][2]


def test_same_step_autoreset_returns_new_episodes_and_keeps_the_old_ones() -> None:
    envs = make(2)
    first, start = envs.reset(seed=0)
    second, rewards, terminated, truncated, infos = envs.step(np.eye(16, dtype=np.int8)[:2])
    assert envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert terminated.all()
    assert not truncated.any()
    for i in range(2):
        for key, value in infos["final_obs"][i].items():
            np.testing.assert_array_equal(value, first[key][i])
        assert indices(infos["final_info"]["kept"][i]) == [i]
        relevant = indices(start["relevant"][i])
        difference = expected_log_likelihood([i], relevant) - expected_log_likelihood(range(16), relevant)
        assert rewards[i] == pytest.approx(difference, abs=1e-6)
    assert (infos["index"] != start["index"]).all()
    assert (second["tokens"] != first["tokens"]).any()
    assert not infos["kept"].any()
    assert not infos["scored"].any()
    assert infos["final_info"]["scored"].all()
    assert infos["_final_obs"].tolist() == infos["final_info"]["_kept"].tolist() == [True, True]


def test_one_call_of_the_model_per_step() -> None:
    vlm = FakeVLM()
    envs = make(4, vlm=vlm, task=FakeTask(10**9), max_tokens=16)
    envs.reset(seed=0)
    assert (len(vlm.encode_calls), len(vlm.score_calls)) == (1, 1)
    for step in range(1, 6):
        envs.step(envs.action_space.sample())
        assert (len(vlm.encode_calls), len(vlm.score_calls)) == (1 + step, 1 + step)
    assert vlm.encode_calls[-1] == 4
    assert vlm.score_calls[-1] == (8, 1, 16)  # four decisions, four new examples with all tokens


def test_examples_in_memory_are_not_scored_in_full_again() -> None:
    vlm = FakeVLM()
    envs = make(4, vlm=vlm, task=FakeTask(4))
    envs.reset(seed=0, options={"index": [0, 1, 2, 3]})
    vlm.encode_calls.clear()
    envs.step(envs.action_space.sample())
    assert vlm.encode_calls == []
    assert vlm.score_calls[-1] == (4, 1, 16)


def test_options_hold_for_all_or_for_each() -> None:
    envs = make(3)
    _, infos = envs.reset(seed=0, options={"index": [4, 2, 4], "budget": 0.5})
    assert infos["index"].tolist() == [4, 2, 4]
    assert infos["k"].tolist() == [8, 8, 8]
    with pytest.raises(ValueError, match="2 values for 3 environments"):
        envs.reset(options={"budget": [0.1, 0.2]})
    with pytest.raises(ValueError, match="budget, index"):
        envs.reset(options={"colour": 1})


def test_bad_options_leave_every_instance_where_it_was() -> None:
    envs, other = make(3), make(3)
    envs.reset(seed=0)
    other.reset(seed=0)
    with pytest.raises(ValueError, match="share"):
        envs.reset(seed=7, options={"budget": [0.1, 0.2, 3.0]})
    with pytest.raises(IndexError, match="does not exist"):
        envs.reset(options={"index": [0, 1, 10]})
    assert envs.reset()[1]["index"].tolist() == other.reset()[1]["index"].tolist()
    assert envs.np_random_seed == other.np_random_seed


def test_returned_arrays_are_copies() -> None:
    envs = make(2)
    first, _ = envs.reset(seed=0)
    kept = {key: value.copy() for key, value in first.items()}
    for value in first.values():
        value.fill(1)
    _, _, _, _, infos = envs.step(np.zeros((2, 16), dtype=np.int8))
    for key, value in kept.items():
        np.testing.assert_array_equal(infos["final_obs"][1][key], value[1])


def test_final_observations_cannot_spoil_what_is_shared() -> None:
    envs = make(2)
    envs.reset(seed=0)
    _, _, _, _, infos = envs.step(np.zeros((2, 16), dtype=np.int8))
    final = infos["final_obs"][0]
    assert set(final) == set(envs.single_observation_space.spaces)
    for value in final.values():
        with pytest.raises(ValueError, match="read-only"):
            value.fill(1)
    before = {key: value.copy() for key, value in final.items()}
    for _ in range(3):
        envs.step(np.ones((2, 16), dtype=np.int8))
    for key, value in before.items():
        np.testing.assert_array_equal(final[key], value)


def test_instances_are_joined_once_for_each_list_of_them() -> None:
    store = make(2).rules.store
    one, two, three = store.load([0, 1, 2]).values()
    batch = store.collate([one, two])
    assert store.collate([one, two]) is batch
    for others in ([two, one], [one, three], [one], [one, two, three], [one, two]):
        joined = store.collate(others)
        expected = Encoded.concatenate([instance.encoded for instance in others])
        assert joined is not batch
        assert [example.key for example in joined.examples] == [instance.example.key for instance in others]
        assert joined.tokens.equal(expected.tokens)
    one.encoded = one.encoded[[0]]  # encoded anew, as after it left the memory
    again = store.collate([one, two])
    assert again is not joined
    assert store.collate([one, two]) is again


def test_final_observations_are_arrays_of_their_own() -> None:
    envs = make(2)
    envs.reset(seed=0, options={"index": 0})
    _, _, _, _, infos = envs.step(np.zeros((2, 16), dtype=np.int8))
    first, second = (final["tokens"] for final in infos["final_obs"])
    assert np.shares_memory(first, second)  # of the same image
    shape = first.shape
    first.shape = (-1,)
    assert second.shape == shape
    observations, _ = envs.reset(options={"index": 0})
    assert observations["tokens"][0].shape == shape


def test_a_limit_of_one_step_truncates_as_gymnasium_does() -> None:
    kwargs = DEFAULTS | {"vlm": FakeVLM(), "max_episode_steps": 1}
    theirs: SyncVectorEnv = SyncVectorEnv(
        [lambda: gymnasium.make("GRIP/TokenSelection-v0", **kwargs)] * 2, autoreset_mode=AutoresetMode.SAME_STEP
    )
    ours = TokenSelectionVectorEnv(2, **kwargs)
    assert data_equivalence(ours.reset(seed=0), theirs.reset(seed=0))
    actions = np.eye(16, dtype=np.int8)[:2]
    found = ours.step(actions)
    assert data_equivalence(found, theirs.step(actions))
    assert found[2].all()
    assert found[3].all()
    unlimited = make(2, max_episode_steps=2)
    unlimited.reset(seed=0)
    assert not unlimited.step(actions)[3].any()


def test_misuse_is_refused() -> None:
    envs = make(2, action_mode="scores")
    with pytest.raises(gymnasium.error.ResetNeeded):
        envs.step(np.zeros((2, 16)))
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=r"\(16,\), expected \(2, 16\)"):
        envs.step(np.zeros(16))
    with pytest.raises(ValueError, match="NaN for 1 of its 32"):
        envs.step(np.array([[np.nan] + [0.0] * 15, [0.0] * 16]))
    with pytest.raises(ValueError, match="3 seeds for 2"):
        envs.reset(seed=[1, 2, 3])
    with pytest.raises(ValueError, match="num_envs"):
        make(0)
    with pytest.raises(ValueError, match="max_episode_steps"):
        make(2, max_episode_steps=0)
    with pytest.raises(ValueError, match="'human'"):
        make(2, render_mode="human")


def test_render_shows_the_decisions_of_the_last_step() -> None:
    envs = make(2, render_mode="rgb_array", budget=0.25)
    envs.reset(seed=0)
    singles = [
        TokenSelectionEnv(**({"vlm": FakeVLM()} | DEFAULTS | {"budget": 0.25}), render_mode="rgb_array") for _ in "ab"
    ]
    for i, env in enumerate(singles):
        env.reset(seed=i)
    actions = np.eye(16, dtype=np.int8)[:2]
    for _ in range(2):
        frames = envs.render()
        assert frames is not None
        for frame, env in zip(frames, singles, strict=True):
            np.testing.assert_array_equal(frame, env.render())
        envs.step(actions)
        for env, action in zip(singles, actions, strict=True):
            if env._episode is not None and env._episode.outcome is None:
                env.step(action)


def test_vector_environments_take_the_arguments_of_their_single_one() -> None:
    class Two(TokenSelectionVectorEnv):
        def __init__(self, share: float) -> None:
            super().__init__(2, budget=share)

    assert list(inspect.signature(Two).parameters) == ["share"]
    assert Two(0.5).reset(seed=0)[1]["k"].tolist() == [72, 72]
    with pytest.raises(TypeError, match=r"TokenSelectionVectorEnv: .*'budgt'"):
        TokenSelectionVectorEnv(2, budgt=0.1)
