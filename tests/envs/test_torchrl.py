"""Trainers that no one here wrote: TorchRL, where it is installed (extra ``trainers``)."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

import grip_env  # noqa: F401  (registers the environments)
from tests.envs.test_specs import ARGUMENTS, COMMON, REGISTERED
from tests.fakes import FakeTask, FakeVLM

torchrl_envs = pytest.importorskip("torchrl.envs", reason="needs the extra trainers")

every_id = pytest.mark.parametrize("name", REGISTERED)


def arguments(name: str) -> dict[str, Any]:
    return COMMON | next(iter(ARGUMENTS[name].values()))


def check(env: Any, infos: bool) -> None:
    """Let TorchRL check its own idea of the environment, and roll it out past ends."""
    torchrl_envs.check_env_specs(env)
    rollout = env.rollout(12, break_when_any_done=False)
    done = rollout["next", "done"].squeeze(-1)
    assert done.any()
    if infos:
        assert rollout["next", "kept"].dtype == torch.bool
        assert rollout["next", "kept"].shape == rollout["next", "token_mask"].shape
    env.close()


@every_id
def test_single_environments_have_the_specs_they_say(name: str) -> None:
    check(torchrl_envs.GymWrapper(gymnasium.make(name, **arguments(name))), infos=False)


INFOS = {"k": torch.int64, "kept_count": torch.int64, "correct": torch.bool, "log_likelihood": torch.float64}


@every_id
@pytest.mark.parametrize("keys", [None, list(INFOS)], ids=["all", "some"])
def test_infos_of_single_environments_become_tensors(name: str, keys: list[str] | None) -> None:
    env = torchrl_envs.GymWrapper(gymnasium.make(name, **arguments(name)))
    if keys is None:
        env = env.auto_register_info_dict()
    else:
        from torchrl.data import Unbounded

        specs = {key: Unbounded((), dtype=INFOS[key]) for key in keys}
        env.set_info_dict_reader(torchrl_envs.default_info_dict_reader(keys, specs))
    check(env, infos=keys is None)
    rollout = env.rollout(6, break_when_any_done=False)
    assert {key: rollout["next", key].dtype for key in INFOS} == INFOS
    if keys is None:
        assert (rollout["next", "kept"].sum(-1) == rollout["next", "kept_count"]).all()


@every_id
@pytest.mark.parametrize("mode", ["SameStep", "Disabled"])  # TorchRL refuses NextStep
def test_native_vector_environments_have_the_specs_they_say(name: str, mode: str) -> None:
    envs = gymnasium.make_vec(name, 2, autoreset_mode=mode, **arguments(name))
    check(torchrl_envs.GymWrapper(envs), infos=mode == "SameStep")


def test_several_processes_have_the_specs_they_say() -> None:
    """The slowest door, as it starts processes: one id stands for all, whose infos have one form."""
    name = "GRIP/SequentialSelection-v0"
    check(torchrl_envs.GymEnv(name, num_envs=2, **arguments(name)), infos=True)


@pytest.mark.parametrize("name", ["TokenSelection", "SequentialSelection"])
def test_rollouts_equal_the_environments_own(name: str) -> None:
    def make() -> Any:
        return gymnasium.make(f"GRIP/{name}-v0", vlm=FakeVLM(), task=FakeTask(), budget=0.25)

    wrapped = torchrl_envs.GymWrapper(make())
    wrapped.set_seed(3)
    rollout = wrapped.rollout(12, break_when_any_done=False)
    plain, rewards = make(), []
    plain.reset(seed=3)  # what set_seed does
    plain.reset()
    for action in rollout["action"]:
        given = int(action.argmax()) if name == "SequentialSelection" else action.numpy().astype(np.int8)
        _, reward, ended, _, _ = plain.step(given)
        rewards.append(reward)
        if ended:
            plain.reset()
    found = rollout["next", "reward"].flatten()
    torch.testing.assert_close(found, torch.tensor(rewards, dtype=found.dtype))
    assert rollout["next", "terminated"].any()


def test_without_autoreset_rollouts_of_many_keep_the_last_observation() -> None:
    envs = gymnasium.make_vec("GRIP/SequentialSelection-v0", 2, autoreset_mode="Disabled", vlm=FakeVLM(), budget=0.125)
    rollout = torchrl_envs.GymWrapper(envs).rollout(8, break_when_any_done=False)
    done = rollout["next", "done"].squeeze(-1)
    assert (rollout["next", "selected"][done].sum(-1) == 2).all()  # k
