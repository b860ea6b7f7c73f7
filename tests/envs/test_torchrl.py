"""Trainers that no one here wrote: TorchRL, where it is installed (extra ``torchrl``)."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

import grip_env  # noqa: F401  (registers the environments)
from tests.fakes import FakeTask, FakeVLM

torchrl_envs = pytest.importorskip("torchrl.envs", reason="needs the extra torchrl")


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
