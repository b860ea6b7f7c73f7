"""What Gymnasium promises of an environment, checked on every id that the project registers."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium
import matplotlib
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.utils.passive_env_checker import (
    env_render_passive_checker,
    env_reset_passive_checker,
    env_step_passive_checker,
)
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import (
    ClipReward,
    FilterObservation,
    FlattenObservation,
    NormalizeReward,
    RecordEpisodeStatistics,
    RenderCollection,
    TimeAwareObservation,
    TimeLimit,
)
from gymnasium.wrappers import vector as many

import grip_env  # noqa: F401  (registers the environments)
from tests.fakes import FakeTask, FakeVLM
from tests.vlms.decoder.test_staged_forward import build

REGISTERED = sorted(spec.id for spec in gymnasium.registry.values() if spec.namespace == "GRIP")


def varying(example: Any) -> int:
    """Give examples 10 to 16 tokens, so that there is padding."""
    return 16 - 3 * (len(example.question) % 3)


COMMON: dict[str, Any] = {"vlm": FakeVLM(count=varying), "task": FakeTask(1000)}
STAGED: dict[str, Any] = {"vlm": build("llava"), "stages": (0, 1, 2)}  # FakeVLM has no layers
ARGUMENTS: dict[str, dict[str, dict[str, Any]]] = {
    "GRIP/TokenSelection-v0": {
        "binary": {"max_tokens": 16, "budget": (0.05, 0.6), "over_budget_penalty": 0.1},
        "scores": {"max_tokens": 16, "budget": [0.25, 1.0], "action_mode": "scores", "question_aware": False},
    },
    "GRIP/TokenScores-v0": {"scores": {"max_tokens": 16, "budget": [0.25, 1.0]}},
    "GRIP/SequentialSelection-v0": {
        "dense": {"max_tokens": 16, "budget": (0.05, 0.5)},
        "sparse": {"max_tokens": 16, "budget": 0.3, "dense": False, "invalid_action_penalty": 0.25},
    },
    "GRIP/ProgressivePruning-v0": {
        "binary": STAGED | {"budget": (0.2, 0.6)},
        "scores": STAGED | {"stage_budgets": (0.6, 0.3, 0.1), "action_mode": "scores", "attention": True},
    },
    "GRIP/SmallSelection-v0": {
        "binary": {"k": 2},
        "scores": {"k": [1, 2], "action_mode": "scores"},
    },
}
CASES = {
    f"{name.removeprefix('GRIP/')} {mode}": (name, COMMON | arguments)
    for name in REGISTERED
    for mode, arguments in ARGUMENTS.get(name, {"default": {}}).items()  # a new id is checked as it is
}
every_case = pytest.mark.parametrize("case", CASES)

ROUND_TRIPS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda env: pickle.loads(pickle.dumps(env)),
    "deepcopy": copy.deepcopy,
}


def make(case: str, **arguments: Any) -> gymnasium.Env[Any, Any]:
    name, own = CASES[case]
    return gymnasium.make(name, **(own | arguments))


def make_many(case: str, mode: str | None = None, num_envs: int = 3, **arguments: Any) -> VectorEnv[Any, Any, Any]:
    name, own = CASES[case]
    how = {} if mode in (None, "vector_entry_point") else {"autoreset_mode": AutoresetMode.SAME_STEP}
    return gymnasium.make_vec(name, num_envs, mode, vector_kwargs=how, **(own | arguments))


def play(env: Any, steps: int, seed: int | None = None) -> list[Any]:
    """Take random actions, and reset a single environment where an episode ends; all that was returned."""
    found = [env.reset(seed=seed)]
    for _ in range(steps):
        action = env.action_space.sample()
        found.append((action, *env.step(action)))
        if not isinstance(env, VectorEnv) and (found[-1][3] or found[-1][4]):
            found.append(env.reset())
    return found


def seeded(env: Any, actions: int = 0) -> Any:
    """Seed the actions alone."""
    env.action_space.seed(actions)
    return env


def assert_alike(found: Any, expected: Any) -> None:
    """Assert that nested results are equal, numbers up to the rounding of batches of another size."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_alike(found[key], value)
    elif isinstance(expected, tuple | list) or (isinstance(expected, np.ndarray) and expected.dtype == object):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_alike(one, other)
    elif isinstance(expected, np.ndarray):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-4)
    else:
        assert found == expected


def test_every_registered_id_has_arguments_here_for_each_of_its_modes() -> None:
    assert REGISTERED
    assert sorted(ARGUMENTS) == REGISTERED, "name the modes of a new id in ARGUMENTS"
    for name in REGISTERED:
        spec = gymnasium.spec(name)
        assert spec.vector_entry_point is not None
        assert spec.max_episode_steps is None


@pytest.mark.parametrize("make_one", [gymnasium.make, gymnasium.make_vec], ids=["single", "vector"])
def test_an_id_is_enough_for_actions_that_are_real_numbers(make_one: Any) -> None:
    env: Any = make_one("grip_env:GRIP/TokenScores-v0", max_tokens=16, **COMMON)
    space = env.action_space if make_one is gymnasium.make else env.single_action_space
    assert isinstance(space, gymnasium.spaces.Box)
    assert (space.shape, space.dtype) == ((16,), np.float32)
    named: Any = make_one("GRIP/TokenSelection-v0", action_mode="scores", max_tokens=16, **COMMON)
    assert data_equivalence(play(seeded(env), 12, seed=3), play(seeded(named), 12, seed=3), exact=True)


# -- one environment -------------------------------------------------------------------------------------


@every_case
def test_gymnasiums_checker_finds_nothing(case: str) -> None:
    matplotlib.use("Agg", force=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = make(case)
        check_env(env.unwrapped)
        env.close()


@every_case
def test_every_step_of_a_rollout_passes_the_passive_checker(case: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = make(case, render_mode="rgb_array")
        bare = seeded(env.unwrapped)
        observation, _ = env_reset_passive_checker(env, seed=0)
        frames = set()
        for step in range(60):
            assert observation in env.observation_space
            observation, reward, terminated, truncated, info = env_step_passive_checker(env, bare.action_space.sample())
            assert type(reward) is float
            assert type(terminated) is bool
            assert truncated is False
            assert not [key for key, value in info.items() if isinstance(value, float) and np.isnan(value)]
            if step < 6:
                frames.add(env_render_passive_checker(env).shape)
            if terminated:
                assert observation in env.observation_space
                observation, _ = env_reset_passive_checker(env)
        ((height, width, _),) = frames  # of one size, and even, for odd ones play in few video players
        assert (height % 2, width % 2) == (0, 0)
        env.close()


@every_case
def test_two_environments_with_one_seed_go_alike(case: str) -> None:
    one, other = (play(seeded(make(case)), 100, seed=5) for _ in "ab")
    assert data_equivalence(one, other, exact=True)
    assert sum(len(entry) == 2 for entry in one) > 15  # episodes


@every_case
def test_seeds_decide_which_episodes_come_and_nothing_else_does(case: str) -> None:
    def starts(env: Any, seed: int | None, most: int = 0) -> list[Any]:
        """Begin six episodes, each of which is left after ``most`` steps or at its end."""
        found = []
        for turn in range(6):
            found.append(env.reset(seed=seed if turn == 0 else None))
            any(env.step(env.action_space.sample())[2] for _ in range(most))
        return found

    env, other = make(case), seeded(make(case))
    first = starts(env, 3)
    assert env.unwrapped.np_random_seed == 3
    assert len({info["index"] for _, info in first}) == 6
    more = starts(env, None)  # goes on
    assert not {info["index"] for _, info in more} & {info["index"] for _, info in first}
    assert data_equivalence(starts(env, 3), first, exact=True)
    assert data_equivalence(starts(env, None), more, exact=True)
    play(other, 7, seed=9)
    for most in (1, 2, 100):  # whatever the agent does
        assert data_equivalence(starts(other, 3, most), first, exact=True)
    assert not data_equivalence(starts(other, 4), first)
    assert not data_equivalence(starts(make(case), None), starts(make(case), None))  # seeded by the system


@every_case
@pytest.mark.parametrize("how", ROUND_TRIPS)
def test_copies_go_on_where_the_original_was(case: str, how: str) -> None:
    env = seeded(make(case))
    assert data_equivalence(play(ROUND_TRIPS[how](env), 12, seed=1), play(env, 12, seed=1), exact=True)
    steps = 0
    for seed in range(40):  # to the middle of an episode, where episodes have more than one step
        env.reset(seed=seed)
        terminated, steps = env.step(env.action_space.sample())[2], steps + 1
        if not terminated:
            break
    twin = ROUND_TRIPS[how](env)
    for _ in range(25):
        if terminated:
            assert data_equivalence(env.reset(), twin.reset(), exact=True)
        action = env.action_space.sample()
        assert np.array_equal(action, twin.action_space.sample())
        found, expected = twin.step(action), env.step(action)
        assert data_equivalence(found, expected, exact=True)
        terminated = expected[2]


@every_case
def test_copies_and_originals_do_not_move_each_other(case: str) -> None:
    env = seeded(make(case))
    expected = play(seeded(make(case)), 20, seed=2)[1:]
    env.reset(seed=2)
    play(copy.deepcopy(env), 9, seed=7)
    found: list[Any] = []
    while len(found) < len(expected):
        action = env.action_space.sample()
        found.append((action, *env.step(action)))
        if found[-1][3]:
            found.append(env.reset())
    assert data_equivalence(found, expected, exact=True)


def form(info: dict[str, Any]) -> dict[str, Any]:
    """Return what trainers rely on: the keys, and the type, dtype and shape of each value."""
    return {
        key: (value.dtype, value.shape) if isinstance(value, np.ndarray) else type(value)
        for key, value in info.items()
        if key not in ("final_obs", "final_info", "_final_obs", "_final_info")
    }


@every_case
def test_infos_have_one_form_in_every_reset_and_step(case: str) -> None:
    env = seeded(make(case))
    infos = [entry[-1] for entry in play(env, 60, seed=0)]
    other = make(case, task=FakeTask(50, relevance=False)).reset(seed=1)[1]
    for info in [*infos, other]:
        assert form(info) == form(infos[0])
        assert not set(info) & set(env.observation_space.spaces)  # trainers put both into one dictionary
        assert all(np.isfinite(value).all() for value in info.values())  # numbers, all of them
        for name in ("kept", "relevant"):
            assert info[name].shape == (env.unwrapped.rules.max_tokens,)  # type: ignore[attr-defined]
            assert info[f"{name}_count"] == np.count_nonzero(info[name])
        assert info["scored"] or (info["log_likelihood"], info["correct"]) == (0.0, False)
    assert [info["relevance_known"] for info in (infos[0], other)] == [True, False]


@every_case
def test_infos_of_many_have_the_form_of_single_ones_stacked(case: str) -> None:
    single = form(make(case).reset(seed=0)[1])
    expected: dict[str, Any] = {}
    for key, kind in single.items():
        column = np.zeros(3, dtype=kind) if isinstance(kind, type) else None
        dtype, shape = kind if column is None else (column.dtype, ())
        expected |= {key: (dtype, (3, *shape)), f"_{key}": (np.dtype(bool), (3,))}
    for mode in (None, "sync"):
        for entry in play(seeded(make_many(case, mode)), 20, seed=2):
            assert form(entry[-1]) == expected
            assert all(entry[-1][f"_{key}"].all() for key in single)
            if "final_info" in entry[-1]:
                assert form(entry[-1]["final_info"]) == expected


# -- many at once ----------------------------------------------------------------------------------------


@every_case
def test_make_vec_is_native_and_equals_gymnasiums_own_vector_environment(case: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours, theirs = make_many(case), make_many(case, "sync")
        assert type(make_many(case, "vector_entry_point").unwrapped) is type(ours.unwrapped)
        assert isinstance(theirs, SyncVectorEnv)
        assert type(ours.unwrapped).__module__.startswith("grip_env.")
        assert ours.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
        assert ours.observation_space == theirs.observation_space
        assert ours.action_space == theirs.action_space
        assert ours.single_observation_space == theirs.single_observation_space
        found, expected = (play(seeded(envs), 30, seed=7) for envs in (ours, theirs))
        assert_alike(found, expected)
        assert all(observations in ours.observation_space for observations in (found[0][0], found[-1][1]))
        assert any(entry[3].any() for entry in found[1:])
        assert_alike(ours.reset(seed=[3, None, 3]), theirs.reset(seed=[3, None, 3]))
        ours.close()
        theirs.close()


@every_case
def test_a_limit_truncates_as_gymnasiums_wrapper_does(case: str) -> None:
    ours, theirs = (make_many(case, mode, max_episode_steps=3) for mode in (None, "sync"))
    found, expected = (play(seeded(envs), 24, seed=1) for envs in (ours, theirs))
    assert_alike(found, expected)
    single = seeded(make(case, max_episode_steps=3))
    lengths, length = set(), 0
    for entry in play(single, 40, seed=1):
        length = 0 if len(entry) == 2 else length + 1
        lengths.add(length)
        assert len(entry) == 2 or entry[4] == (length == 3)
    assert max(lengths) <= 3


@every_case
@pytest.mark.parametrize("how", ROUND_TRIPS)
def test_copies_of_many_go_on_where_the_original_was(case: str, how: str) -> None:
    envs = seeded(make_many(case))
    assert data_equivalence(play(ROUND_TRIPS[how](envs), 6, seed=1), play(envs, 6, seed=1), exact=True)
    twin = ROUND_TRIPS[how](envs)  # episodes are at different steps
    for _ in range(12):
        actions = envs.action_space.sample()
        assert data_equivalence(twin.step(actions), envs.step(actions), exact=True)
    assert data_equivalence(twin.reset(), envs.reset(), exact=True)


@every_case
def test_many_with_one_seed_go_alike_and_with_another_do_not(case: str) -> None:
    one, other = (play(seeded(make_many(case)), 24, seed=5) for _ in "ab")
    assert data_equivalence(one, other, exact=True)
    assert not data_equivalence(play(seeded(make_many(case)), 24, seed=6), one)


# -- specs -----------------------------------------------------------------------------------------------


SMALLEST: dict[str, dict[str, Any]] = {"GRIP/SmallSelection-v0": {"k": 1, "table_cache": None}}


@pytest.mark.parametrize("name", REGISTERED)
@pytest.mark.parametrize("vector", [False, True], ids=["single", "vector"])
def test_a_spec_survives_json_and_makes_the_same_environment(name: str, vector: bool) -> None:
    arguments = {"vlm": "tiny", "task": "scenes", "split": "validation"} | SMALLEST.get(name, {})
    if vector:
        env: Any = gymnasium.make_vec(name, num_envs=2, **arguments)
        spec = EnvSpec.from_json(env.spec.to_json())
        again: Any = gymnasium.make_vec(spec)
        assert again.num_envs == 2
    else:
        env = gymnasium.make(name, max_episode_steps=50, **arguments)
        spec = EnvSpec.from_json(env.spec.to_json())
        again = gymnasium.make(spec)
        assert again.spec.max_episode_steps == 50
    assert json.loads(again.spec.to_json()) == json.loads(env.spec.to_json())
    assert {key: again.spec.kwargs[key] for key in arguments} == arguments
    assert type(again.unwrapped) is type(env.unwrapped)
    assert data_equivalence(play(seeded(again), 2, seed=0), play(seeded(env), 2, seed=0), exact=True)


@pytest.mark.parametrize("name", [name for name in REGISTERED if "Small" not in name])
@pytest.mark.parametrize("vector", [False, True], ids=["single", "vector"])
def test_a_range_of_budgets_survives_json(name: str, vector: bool) -> None:
    """A tuple does not: JSON makes it a list, which is a choice between two budgets."""
    make_one: Any = gymnasium.make_vec if vector else gymnasium.make
    env = make_one(name, vlm="tiny", split="validation", budget={"low": 0.05, "high": 0.5})
    again = make_one(EnvSpec.from_json(env.spec.to_json()))
    plain = make_one(name, vlm="tiny", split="validation", budget=(0.05, 0.5))
    assert again.unwrapped.rules.budget == plain.unwrapped.rules.budget == (0.05, 0.5)
    for seed in range(3):
        assert data_equivalence(again.reset(seed=seed), plain.reset(seed=seed), exact=True)


# -- standard wrappers -----------------------------------------------------------------------------------


@every_case
def test_episode_statistics_are_sums_of_what_was_paid(case: str) -> None:
    env = seeded(RecordEpisodeStatistics(make(case)))
    paid: list[float] = []
    for entry in play(env, 40, seed=0):
        if len(entry) == 2:
            paid = []
            continue
        paid.append(entry[2])
        assert ("episode" in entry[5]) == entry[3]
        if entry[3]:
            assert entry[5]["episode"]["r"] == pytest.approx(sum(paid), abs=1e-5)
            assert entry[5]["episode"]["l"] == len(paid)


@every_case
def test_episode_statistics_of_many_are_sums_of_what_was_paid(case: str) -> None:
    envs = seeded(many.RecordEpisodeStatistics(make_many(case)))
    returns, lengths, ends = np.zeros(3), np.zeros(3, dtype=int), 0
    for _, _, rewards, terminated, _, infos in play(envs, 30, seed=0)[1:]:
        returns += rewards
        lengths += 1
        for i in np.flatnonzero(terminated):
            assert infos["episode"]["r"][i] == pytest.approx(returns[i], abs=1e-5)
            assert infos["episode"]["l"][i] == lengths[i]
            returns[i] = lengths[i] = 0
            ends += 1
    assert ends >= 6


@every_case
def test_standard_wrappers_go_on_top(case: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = play(seeded(make(case)), 20, seed=4)
        env: Any = RenderCollection(make(case, render_mode="rgb_array"))
        env = FilterObservation(env, [key for key in env.observation_space.spaces if key != "positions"])
        env = NormalizeReward(ClipReward(TimeAwareObservation(TimeLimit(env, 50)), -0.5, 0.5))
        env = seeded(FlattenObservation(env))
        found = play(env, 20, seed=4)
        assert env.observation_space.shape == found[0][0].shape
        assert found[0][0] in env.observation_space
        assert [len(entry) for entry in found] == [len(entry) for entry in plain]
        ends = [entry[3:5] for entry in plain if len(entry) > 2]
        assert [entry[3:5] for entry in found if len(entry) > 2] == ends
        assert len({frame.shape for frame in env.render()}) == 1
        env.close()


@every_case
def test_standard_wrappers_go_on_top_of_many(case: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = play(seeded(make_many(case)), 12, seed=4)
        envs = seeded(many.DictInfoToList(many.NormalizeReward(many.ClipReward(make_many(case), -0.5, 0.5))))
        found = play(envs, 12, seed=4)
        for entry, expected in zip(found[1:], plain[1:], strict=True):
            assert data_equivalence(entry[1], expected[1], exact=True)
            assert (np.sign(entry[2]) == np.sign(expected[2])).all()
            assert [("final_info" in info) for info in entry[5]] == expected[3].tolist()
        envs.close()


@every_case
def test_wrappers_of_observations_go_on_top_of_many_in_gymnasiums_own_vector_environment(case: str) -> None:
    """Gymnasium's vector wrappers of observations refuse every SAME_STEP environment; ``wrappers=`` is the way."""
    with pytest.raises(ValueError, match="NEXT_STEP or DISABLED"):
        many.FlattenObservation(make_many(case))
    name, own = CASES[case]
    how = {"autoreset_mode": AutoresetMode.SAME_STEP}
    flat: Any = gymnasium.make_vec(name, 2, "sync", vector_kwargs=how, wrappers=[FlattenObservation], **own)
    plain = make_many(case, num_envs=2)
    space = plain.single_observation_space
    for entry, expected in zip(play(seeded(flat), 8, seed=4), play(seeded(plain), 8, seed=4), strict=True):
        observations, original = (one[0] if len(one) == 2 else one[1] for one in (entry, expected))
        for i, row in enumerate(observations):
            alone = {key: value[i] for key, value in original.items()}
            np.testing.assert_allclose(row, gymnasium.spaces.flatten(space, alone), atol=1e-4)
