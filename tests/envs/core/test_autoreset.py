"""Gymnasium's three autoreset modes, held against its own vector environment of our single ones."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import vector as many

from tests.envs.test_specs import CASES, assert_alike, every_case, form, seeded
from tests.fakes import FakeTask, FakeVLM

every_mode = pytest.mark.parametrize("mode", AutoresetMode, ids=lambda mode: mode.value)


def make(case: str, mode: AutoresetMode | str, how: str | None = None, num_envs: int = 3, **more: Any) -> Any:
    """Make a native environment or, with ``how``, Gymnasium's own."""
    name, own = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how is None:
            return gymnasium.make_vec(name, num_envs, autoreset_mode=mode, **(own | more))
        return gymnasium.make_vec(name, num_envs, how, vector_kwargs={"autoreset_mode": mode}, **(own | more))


def play(envs: VectorEnv[Any, Any, Any], steps: int, seed: int = 7, restart: float = 0.0) -> list[Any]:
    """Act at random and, where nothing else does, begin the next episodes; now and then some that have not ended."""
    generator = np.random.default_rng(seed)
    found: list[Any] = [envs.reset(seed=seed)]
    for _ in range(steps):
        found.append(envs.step(envs.action_space.sample()))
        mask = generator.random(envs.num_envs) < restart
        if envs.metadata["autoreset_mode"] is AutoresetMode.DISABLED:
            mask |= found[-1][2] | found[-1][3]
        if mask.any():
            seeds = [int(own) if own < 20 else None for own in generator.integers(0, 40, envs.num_envs)]
            found.append(envs.reset(seed=seeds, options={"reset_mask": mask}))
    return found


@every_case
@every_mode
def test_every_mode_equals_gymnasiums_own_vector_environment(case: str, mode: AutoresetMode) -> None:
    ours, theirs = make(case, mode), make(case, mode, "sync")
    assert isinstance(theirs, SyncVectorEnv)
    assert ours.unwrapped.autoreset_mode is ours.metadata["autoreset_mode"] is mode
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that steps are idle
        found, expected = (play(seeded(envs), 12, restart=0.2) for envs in (ours, theirs))
    assert_alike(found, expected)
    for one, other in zip(found, expected, strict=True):
        assert form(one[-1]) == form(other[-1])
    assert any(entry[2].any() for entry in found if len(entry) == 5)
    assert ours.np_random_seed == theirs.np_random_seed
    assert type(ours.unwrapped).metadata["autoreset_mode"] is AutoresetMode.SAME_STEP  # of the class, still


@every_case
@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED], ids=lambda mode: mode.value)
def test_limits_end_episodes_in_every_mode(case: str, mode: AutoresetMode) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = (make(case, mode, how, max_episode_steps=2) for how in (None, "sync"))
        found, expected = (play(seeded(envs), 8) for envs in (ours, theirs))
    assert_alike(found, expected)
    truncated = any(entry[3].any() for entry in found if len(entry) == 5)
    assert truncated is not ours.unwrapped.rules.one_step


@every_case
@every_mode
def test_copies_go_on_in_every_mode(case: str, mode: AutoresetMode) -> None:
    envs = make(case, mode)
    play(seeded(envs), 2)
    twin = copy.deepcopy(envs)
    assert twin.metadata["autoreset_mode"] is mode
    assert_alike(play(twin, 3), play(envs, 3))


@every_case
def test_vector_wrappers_of_observations_go_on_top(case: str) -> None:
    for mode in (AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED):
        plain = play(seeded(make(case, mode)), 8)
        flat = seeded(many.FlattenObservation(make(case, mode)))
        space = flat.env.single_observation_space
        for entry, expected in zip(play(flat, 8), plain, strict=True):
            assert entry[0].shape == (3, gymnasium.spaces.flatdim(space))
            for i, row in enumerate(entry[0]):
                alone = {key: value[i] for key, value in expected[0].items()}
                np.testing.assert_allclose(row, gymnasium.spaces.flatten(space, alone), atol=1e-4)
        doubled = many.TransformObservation(
            make(case, mode), lambda seen: {key: value * 2 for key, value in seen.items()}, flat.env.observation_space
        )
        np.testing.assert_allclose(play(seeded(doubled), 8)[-1][0]["budget"], plain[-1][0]["budget"] * 2, atol=1e-4)
    normal = many.NormalizeObservation(many.FlattenObservation(make(case, AutoresetMode.NEXT_STEP)))
    assert all(np.isfinite(entry[0]).all() for entry in play(seeded(normal), 8))


class KeepsOptions(gymnasium.vector.VectorWrapper[Any, Any, Any, Any, Any]):
    """Hides from the wrappers above that SyncVectorEnv takes ``reset_mask`` out of the options it is given."""

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> Any:
        return self.env.reset(seed=seed, options=None if options is None else dict(options))


@every_case
@every_mode
def test_episode_statistics_are_those_of_gymnasiums_own(case: str, mode: AutoresetMode) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pair = [KeepsOptions(make(case, mode, how)) for how in (None, "sync")]
        found, expected = (play(seeded(many.RecordEpisodeStatistics(envs)), 10) for envs in pair)
    ends = 0
    for one, other in zip(found, expected, strict=True):
        assert one[-1].keys() == other[-1].keys()
        if "episode" in one[-1]:
            ends += 1
            for name in ("r", "l"):
                np.testing.assert_allclose(one[-1]["episode"][name], other[-1]["episode"][name], atol=1e-4)
    assert ends


def test_modes_have_names() -> None:
    for name in ("NextStep", "NEXT_STEP", "next_step"):
        assert make("TokenSelection-v0 binary", name).metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    for wrong in ("sometimes", 3, None):
        with pytest.raises(ValueError, match='one of "NextStep", "SameStep", "Disabled"; got'):
            make("TokenSelection-v0 binary", wrong)  # type: ignore[arg-type]


def test_the_next_step_ignores_its_action_whatever_it_is() -> None:
    envs = make("TokenSelection-v0 scores", AutoresetMode.NEXT_STEP)
    envs.reset(seed=0)
    scores = envs.action_space.sample()
    assert envs.step(scores)[2].all()
    _, rewards, terminated, _, infos = envs.step(np.full_like(scores, np.nan))
    assert rewards.tolist() == [0.0] * 3
    assert not terminated.any()
    assert not infos["scored"].any()
    with pytest.raises(ValueError, match="NaN"):
        envs.step(np.full_like(scores, np.nan))
    envs.step(scores)
    with pytest.raises(ValueError, match="shape"):
        envs.step(scores[:2])


def test_without_autoreset_nothing_steps_past_an_end() -> None:
    envs = make("TokenSelection-v0 binary", AutoresetMode.DISABLED)
    envs.reset(seed=0)
    action = np.zeros(envs.action_space.shape, dtype=np.int8)
    first = envs.step(action)
    with pytest.raises(gymnasium.error.ResetNeeded, match=r"\[0, 1, 2\] have ended.*reset_mask"):
        envs.step(action)
    seen, infos = envs.reset(options={"reset_mask": np.array([True, False, True])})
    assert infos["_k"].tolist() == [True, False, True]
    np.testing.assert_array_equal(seen["tokens"][1], first[0]["tokens"][1])  # still the old one
    with pytest.raises(gymnasium.error.ResetNeeded, match=r"\[1\] have ended"):
        envs.step(action)
    options = {"reset_mask": [False, True, False], "budget": 0.5}
    assert envs.reset(options=options)[1]["k"][1] > 1
    assert set(options) == {"reset_mask", "budget"}  # untouched
    assert envs.step(action)[2].all()


@pytest.mark.parametrize(
    "mask", [[True], [1, 0, 0], [False] * 3, "yes", np.ones((3, 1), dtype=bool), np.ones(3), True], ids=repr
)
def test_other_masks_are_refused_and_change_nothing(mask: Any) -> None:
    envs, twin = (make("TokenSelection-v0 binary", AutoresetMode.DISABLED) for _ in "ab")
    envs.reset(seed=0)
    twin.reset(seed=0)
    with pytest.raises(ValueError, match=r"'reset_mask' is bool \(3,\)"):
        envs.reset(seed=5, options={"reset_mask": mask})
    assert_alike(envs.reset(), twin.reset())


def test_a_mask_needs_episodes_to_leave_alone() -> None:
    envs = make("TokenSelection-v0 binary", AutoresetMode.DISABLED)
    with pytest.raises(gymnasium.error.ResetNeeded, match="without 'reset_mask'"):
        envs.reset(options={"reset_mask": np.array([True, False, False])})
    envs.reset(options={"reset_mask": np.ones(3, dtype=bool)})


# -- a warning -------------------------------------------------------------------------------------------


ARGUMENTS: dict[str, Any] = {"vlm": FakeVLM(), "task": FakeTask()}


def warned(make_and_play: Any) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_and_play()
    return sum("every second step ignores its action" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("name", ["TokenSelection", "SmallSelection", "SequentialSelection"])
def test_idle_steps_are_warned_of_once(name: str) -> None:
    """As many steps are idle as episodes have ended: where they have one step, that is half of all."""
    more = {"k": 1, "table_cache": None} if name == "SmallSelection" else {}
    once = int(name != "SequentialSelection")

    def run(how: str | None, mode: AutoresetMode | None) -> None:
        own = {} if mode is None else {"autoreset_mode": mode}
        vector = {"vector_kwargs": own} if how else own
        envs: Any = gymnasium.make_vec(f"GRIP/{name}-v0", 3, how, **vector, **ARGUMENTS, **more)
        envs.reset(seed=0)
        for _ in range(6):
            _, _, terminated, truncated, _ = envs.step(envs.action_space.sample())
            if mode is AutoresetMode.DISABLED and (terminated | truncated).any():
                envs.reset(options={"reset_mask": terminated | truncated})
        envs.close()

    assert warned(lambda: run("sync", None)) == once  # its default
    assert warned(lambda: run("sync", AutoresetMode.NEXT_STEP)) == once
    assert warned(lambda: run(None, AutoresetMode.NEXT_STEP)) == once
    for how in ("sync", None):
        assert warned(lambda how=how: run(how, AutoresetMode.SAME_STEP)) == 0  # type: ignore[misc]
        assert warned(lambda how=how: run(how, AutoresetMode.DISABLED)) == 0  # type: ignore[misc]


def test_resets_by_hand_are_not_warned_of() -> None:
    def single() -> None:
        env = gymnasium.make("GRIP/TokenSelection-v0", **ARGUMENTS)
        for _ in range(3):
            env.reset()
            env.step(env.action_space.sample())

    def many_by_hand() -> None:
        envs = gymnasium.make_vec("GRIP/TokenSelection-v0", 2, "sync", **ARGUMENTS)
        for _ in range(3):
            envs.reset()
            envs.step(envs.action_space.sample())

    assert warned(single) == warned(many_by_hand) == 0


@pytest.mark.parametrize("options", [{"budget": 1 / 16}, {"budget": 0.5, "max_episode_steps": 1}])
@pytest.mark.parametrize("native", [False, True])
def test_episodes_that_happen_to_have_one_step_warn_once(options: dict[str, Any], native: bool) -> None:
    about: dict[str, Any] = {"vlm": FakeVLM(), "task": FakeTask(20), "split": "test", **options}
    mode: Any = {"autoreset_mode": "NextStep"} if native else {"vectorization_mode": "sync"}
    envs = gymnasium.make_vec("GRIP/SequentialSelection-v0", 2, **mode, **about)
    envs.reset(seed=0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for action in (0, 1, 2, 3, 4, 5):
            envs.step(np.array([action, action]))
    said = [str(one.message) for one in told if "every second step" in str(one.message)]
    assert len(said) == 1
    assert "an episode here had one step" in said[0]


def test_longer_episodes_do_not_warn() -> None:
    about: dict[str, Any] = {"vlm": FakeVLM(), "task": FakeTask(20), "split": "test", "budget": 0.2}
    envs = gymnasium.make_vec("GRIP/SequentialSelection-v0", 2, vectorization_mode="sync", **about)
    envs.reset(seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for action in range(10):
            envs.step(np.array([action, action]))


def test_gymnasiums_autoreset_wrapper_warns_once() -> None:
    about: dict[str, Any] = {"vlm": FakeVLM(), "task": FakeTask(20), "split": "test", "budget": 0.2}
    env = gymnasium.wrappers.Autoreset(gymnasium.make("GRIP/TokenScores-v0", **about))
    env.reset(seed=0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(6):
            env.step(env.action_space.sample())
    assert len([one for one in told if "every second step" in str(one.message)]) == 1


@every_case
def test_infos_of_single_environments_are_arrays_with_a_dtype(case: str) -> None:
    name, own = CASES[case]
    env = gymnasium.make(name, **own)
    infos = [env.reset(seed=0)[1]]
    env.action_space.seed(0)
    for _ in range(3):
        *_, ended, cut, info = env.step(env.action_space.sample())
        infos.append(info)
        if ended or cut:
            break
    for info in infos:
        assert all(isinstance(value, np.ndarray | np.number) for value in info.values()), info
        assert {key: (value.dtype, np.shape(value)) for key, value in info.items()} == {
            key: (value.dtype, np.shape(value)) for key, value in infos[0].items()
        }
