"""Trainers and tools that no one here wrote: Tianshou and Minari, where they are installed (extra ``trainers``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

import grip_env  # noqa: F401  (registers the environments)
from tests.envs.test_specs import ARGUMENTS, COMMON, REGISTERED

every_id = pytest.mark.parametrize("name", REGISTERED)


def make(name: str) -> gymnasium.Env[Any, Any]:
    return gymnasium.make(name, **(COMMON | next(iter(ARGUMENTS[name].values()))))


@every_id
def test_tianshou_collects_infos_whatever_the_data(name: str) -> None:
    """Lists of indices failed here by chance: where two examples had as many relevant tokens, they were stacked."""
    data = pytest.importorskip("tianshou.data", reason="needs the extra trainers")
    from tianshou.algorithm.algorithm_base import Policy
    from tianshou.env import DummyVectorEnv

    class Random(Policy):
        def forward(self, batch: Any, state: Any = None, **_: Any) -> Any:
            masks = batch.info.action_mask if "action_mask" in batch.info else [None] * len(batch.info)
            return data.Batch(act=np.stack([self.action_space.sample(mask) for mask in masks]), state=state)

    env = make(name)
    policy = Random(action_space=env.action_space, observation_space=env.observation_space)
    buffer = data.VectorReplayBuffer(60, 3)
    collector = data.Collector(policy, DummyVectorEnv([lambda: make(name)] * 3), buffer)
    collector.reset()
    assert collector.collect(n_step=30).n_collected_steps == 30
    kept = buffer.info.kept[buffer.sample_indices(0)]
    assert (kept.dtype, kept.shape) == (bool, (30, env.unwrapped.rules.max_tokens))  # type: ignore[attr-defined]
    assert buffer.info.scored[buffer.sample_indices(0)].any()


@every_id
def test_minari_writes_and_reads_infos(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minari = pytest.importorskip("minari", reason="needs the extra trainers")
    for needed in ("jax", "h5py"):
        pytest.importorskip(needed, reason="needs the extra trainers")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = minari.DataCollector(make(name), record_infos=True)
    played: list[list[dict[str, Any]]] = []
    for seed in range(3):
        infos, ended = [env.reset(seed=seed)[1]], False
        while not ended:
            mask = infos[-1].get("action_mask")
            _, _, ended, _, info = env.step(env.action_space.sample(mask))
            infos.append(info)
        played.append(infos)
    dataset = env.create_dataset(dataset_id="grip/test-v0")
    assert dataset.total_episodes == 3
    for episode, infos in zip(dataset, played, strict=True):
        assert episode.infos.keys() == infos[0].keys()
        for key, values in episode.infos.items():
            np.testing.assert_array_equal(values, np.stack([info[key] for info in infos]))
    env.close()
