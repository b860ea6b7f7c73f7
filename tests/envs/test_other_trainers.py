"""Trainers and tools that no one here wrote, as README shows them.

Tianshou, Minari and RLlib run where they are installed (extra ``trainers``; ``pip install "ray[rllib]"``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

import grip_env
from tests.envs.test_specs import ARGUMENTS, COMMON, REGISTERED

README = Path(__file__).parents[2] / "README.md"

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


def episodes_of(envs: gymnasium.vector.SyncVectorEnv, act: Any, steps: int) -> list[tuple[float, int]]:
    """Return return and length of every episode that ended, as CleanRL reads them."""
    ended: list[tuple[float, int]] = []
    observations, _ = envs.reset(seed=1)
    for _ in range(steps):
        observations, _, _, _, infos = envs.step(act())
        assert np.isfinite(observations).all()
        if "final_info" in infos:
            over = infos["final_info"]["_episode"]
            found = infos["final_info"]["episode"]
            ended += zip(found["r"][over].tolist(), found["l"][over].tolist(), strict=True)
    return ended


def test_cleanrls_wrappers_for_continuous_actions_take_the_id_as_it_is() -> None:
    """The wrappers of ``ppo_continuous_action.py``, which knows nothing but an id."""

    def build() -> gymnasium.Env[Any, Any]:
        env: gymnasium.Env[Any, Any] = gymnasium.make("grip_env:GRIP/TokenScores-v0")
        env = gymnasium.wrappers.FlattenObservation(env)
        env = gymnasium.wrappers.RecordEpisodeStatistics(env)
        env = gymnasium.wrappers.ClipAction(env)
        env = gymnasium.wrappers.NormalizeObservation(env)
        # the script gives two arguments, but Gymnasium 1.0 made the space a third one without a default
        space = env.observation_space
        env = gymnasium.wrappers.TransformObservation(env, lambda values: np.clip(values, -10, 10), space)
        env = gymnasium.wrappers.NormalizeReward(env, gamma=0.99)
        return gymnasium.wrappers.TransformReward(env, lambda value: float(np.clip(value, -10, 10)))

    envs = gymnasium.vector.SyncVectorEnv([build] * 2, autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP)
    assert isinstance(envs.single_action_space, gymnasium.spaces.Box)
    normal = np.random.default_rng(0)
    ended = episodes_of(envs, lambda: normal.normal(size=envs.action_space.shape).astype(np.float32), 4)
    assert [length for _, length in ended] == [1] * 8
    assert len({value for value, _ in ended}) == 8
    envs.close()


def test_cleanrls_wrappers_for_discrete_actions_need_one_line_more() -> None:
    """``ppo.py`` with ``FlattenObservation``; the returns of episodes are those that the environment paid."""

    def build() -> gymnasium.Env[Any, Any]:
        env: gymnasium.Env[Any, Any] = gymnasium.make("grip_env:GRIP/SequentialSelection-v0", budget=0.03)
        env = gymnasium.wrappers.FlattenObservation(env)
        return gymnasium.wrappers.RecordEpisodeStatistics(env)

    envs = gymnasium.vector.SyncVectorEnv([build] * 2, autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP)
    assert isinstance(envs.single_action_space, gymnasium.spaces.Discrete)
    assert envs.single_observation_space.shape is not None
    paid: list[float] = []
    envs.action_space.seed(0)
    ended = episodes_of(envs, envs.action_space.sample, 24)
    assert {length for _, length in ended} <= set(range(4, 9))  # four tokens, and now and then one twice
    assert len(ended) >= 2 * 24 // 8
    # one more episode by hand: what is paid adds up to what the wrapper says
    observation, _ = envs.reset(seed=5)
    del observation
    while True:
        _, rewards, terminations, _, infos = envs.step(envs.action_space.sample())
        paid.append(float(rewards[0]))
        if terminations[0]:
            assert infos["final_info"]["episode"]["r"][0] == pytest.approx(sum(paid), abs=1e-5)
            break
    envs.close()


def test_replay_buffers_and_normalisation_are_as_readme_says() -> None:
    from stable_baselines3.common.buffers import DictReplayBuffer

    def gib(**options: Any) -> float:
        env: Any = gymnasium.make("GRIP/TokenScores-v0", **options)
        buffer = DictReplayBuffer(100, env.observation_space, env.action_space)
        arrays = [*buffer.observations.values(), *buffer.next_observations.values()]
        return 10**6 / 100 * sum(array.nbytes for array in arrays) / 2**30

    said = f"holds {gib():.0f} GiB of observations and next observations here, and "
    assert said + f"{gib(feature_dim=16, obs_dtype='float16'):.1f} GiB with" in README.read_text(encoding="utf-8")
    env = gymnasium.make("GRIP/TokenScores-v0")
    seen = [env.reset(seed=seed)[0] for seed in range(16)]
    tokens = np.concatenate([one["tokens"][one["token_mask"] == 1] for one in seen])
    words = np.concatenate([one["question"][one["question_mask"] == 1] for one in seen])
    assert tokens.std() == pytest.approx(2, abs=0.5)
    assert words.std() == pytest.approx(0.1, abs=0.05)


@pytest.mark.parametrize("name", ["SAC", "TD3", "DDPG"])
def test_algorithms_with_replay_buffers_train_on_the_id_with_real_actions(name: str) -> None:
    import stable_baselines3
    from stable_baselines3.common.vec_env import VecNormalize

    options: dict[str, Any] = {**COMMON, "max_tokens": 16, "feature_dim": 8, "obs_dtype": "float16"}
    native = gymnasium.make_vec("GRIP/TokenScores-v0", num_envs=2, **options)
    envs = VecNormalize(grip_env.as_sb3_vec_env(native), norm_obs_keys=["tokens", "question"], norm_reward=False)
    model = getattr(stable_baselines3, name)(
        "MultiInputPolicy", envs, buffer_size=64, learning_starts=8, batch_size=8, seed=0, train_freq=1
    )
    before = [weight.detach().clone() for weight in model.actor.parameters()]
    model.learn(24)
    assert model.replay_buffer.observations["tokens"].dtype == np.float16
    assert any(not old.equal(new) for old, new in zip(before, model.actor.parameters(), strict=True))


def test_rllib_trains_on_flattened_observations() -> None:
    ray = pytest.importorskip("ray", reason="needs ray[rllib]")
    ppo = pytest.importorskip("ray.rllib.algorithms.ppo", reason="needs ray[rllib]")

    def build(options: dict[str, Any]) -> gymnasium.Env[Any, Any]:
        env = gymnasium.make("GRIP/TokenScores-v0", feature_dim=16, **options)
        return gymnasium.wrappers.FlattenObservation(env)

    ray.tune.registry.register_env("grip", build)
    config = ppo.PPOConfig().environment("grip", env_config={"budget": 0.1})
    config = config.env_runners(num_env_runners=0, num_envs_per_env_runner=4)
    algorithm = config.training(train_batch_size=32, minibatch_size=16, num_epochs=2, gamma=1.0).build_algo()
    try:
        result = algorithm.train()["env_runners"]
    finally:
        algorithm.stop()
        ray.shutdown()
    assert (result["episode_len_min"], result["episode_len_max"]) == (1, 1)
    assert -20 < result["episode_return_mean"] < 0
