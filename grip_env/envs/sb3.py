"""Adapter from the vector environments to the ``VecEnv`` of Stable-Baselines3.

Each step calls the model for all of them together.

Raffin et al., "Stable-Baselines3: Reliable Reinforcement Learning Implementations" (JMLR, 2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from grip_env.envs.core.single_env import as_arrays

__all__ = ["as_sb3_vec_env"]

_PER_INSTANCE = ("example", "np_random", "np_random_seed")
_PER_INSTANCE_METHODS = ("action_masks", "render")


def as_sb3_vec_env(envs: VectorEnv[Any, Any, Any]) -> VecEnv:
    """Wrap a vector environment as a ``VecEnv`` that Stable-Baselines3 can train on.

    ``DummyVecEnv`` steps its environments one after another, with a call of the language model for each; this adapter
    steps all of them in one call. It returns the same as a ``DummyVecEnv`` of single environments: float32 rewards, and
    at the end of an episode the info of its last step (``log_likelihood``, ``correct``, ``kept`` ...) with
    ``terminal_observation`` and ``TimeLimit.truncated``, while the observation and ``reset_infos`` belong to the
    next episode. sb3-contrib's MaskablePPO finds ``action_masks`` of token-by-token episodes. Wrap the result in
    ``VecMonitor`` for episode statistics (its ``info_keywords`` can be ``("log_likelihood", "correct")``).

    With ``action_mode="scores"``, pass ``policy_kwargs={"log_std_init": -2.0}`` to PPO and A2C. By default they start
    with a standard deviation of 1 and clip actions to [-1, 1], so that more scores than the budget has room for are 1,
    and chance decides which of these tokens are kept. For token-by-token episodes pass ``gamma=1.0``, as
    :class:`~grip_env.envs.sequential.SequentialSelectionEnv` explains.

    The instances share one set of rules: ``set_attr`` sets an attribute for all of them, ``get_attr`` returns the same
    value for each (except for ``example``, ``np_random`` and ``np_random_seed``), and ``env_method`` supports
    ``action_masks`` and ``render``.

    Args:
        envs: Vector environment from ``gymnasium.make_vec`` or a class of this project, wrapped or not.

    Raises:
        TypeError: If it is not a ``gymnasium.vector.VectorEnv``.
        ValueError: If it does not begin the next episode in the step that ends one (``AutoresetMode.SAME_STEP``).

    ```python
    import gymnasium
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import VecMonitor

    import grip_env

    envs = gymnasium.make_vec("GRIP/TokenSelection-v0", num_envs=16, action_mode="scores")
    model = PPO(
        "MultiInputPolicy",
        VecMonitor(grip_env.as_sb3_vec_env(envs)),
        n_steps=4,
        batch_size=64,
        policy_kwargs={"log_std_init": -2.0},
    )
    model.learn(256)
    ```
    """
    if not isinstance(envs, VectorEnv):
        raise TypeError(
            f"as_sb3_vec_env takes a vector environment, such as gymnasium.make_vec returns; got "
            f"{type(envs).__name__}: Stable-Baselines3 takes a single environment as it is"
        )
    mode = envs.metadata.get("autoreset_mode")
    if mode is not AutoresetMode.SAME_STEP:
        raise ValueError(
            f"Stable-Baselines3 needs an environment that begins the next episode in the step that ends one "
            f"(AutoresetMode.SAME_STEP), but this one has {mode}: make it without vectorization_mode and "
            "autoreset_mode"
        )
    return _VectorEnvAsVecEnv(envs)


class _VectorEnvAsVecEnv(VecEnv):
    def __init__(self, envs: VectorEnv[Any, Any, Any]) -> None:
        self.envs = envs
        self._actions: list[np.ndarray] = []  # of the next step
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)

    def reset(self) -> Any:
        """Begin an episode in every instance.

        Seeds and options that were set before are used once.
        """
        self._actions = []
        seeds: Any = list(self._seeds)
        observations, infos = self.envs.reset(seed=seeds, options=self._merged_options())
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = _split(infos, self.num_envs)
        return observations

    def step_async(self, actions: np.ndarray) -> None:
        """Store the actions of the next step."""
        self._actions = [actions]

    def step_wait(self) -> VecEnvStepReturn:
        """Step all instances together."""
        if not self._actions:
            raise RuntimeError("there are no actions; call step_async() before step_wait()")
        actions = self._actions.pop()
        observations, rewards, terminated, truncated, vector_infos = self.envs.step(actions)
        infos = _split(vector_infos, self.num_envs)
        for i, done in enumerate(terminated | truncated):
            if done:
                start = infos[i]
                infos[i] = start.pop("final_info") | {"terminal_observation": start.pop("final_obs")}
                if "episode" in start:  # from Gymnasium's RecordEpisodeStatistics, about the episode that ended
                    infos[i]["episode"] = start.pop("episode")
                self.reset_infos[i] = start
            infos[i]["TimeLimit.truncated"] = bool(truncated[i] and not terminated[i])
        return observations, rewards.astype(np.float32), terminated | truncated, infos

    def close(self) -> None:
        """Close the vector environment."""
        self.envs.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Return a frame of each instance, uint8 (height, width, 3), all of one size."""
        frames: Any = self.envs.render()
        return [None] * self.num_envs if frames is None else list(frames)

    def has_attr(self, attr_name: str) -> bool:
        """Return whether the vector environment has such an attribute."""
        return hasattr(self.envs.unwrapped, attr_name)

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Return the value of an attribute for each of the instances."""
        value, rows = getattr(self.envs.unwrapped, attr_name), self._get_indices(indices)
        return [value[row] if attr_name in _PER_INSTANCE else value for row in rows]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of the vector environment.

        Raises:
            ValueError: If ``indices`` does not cover all instances.
        """
        if set(self._get_indices(indices)) != set(range(self.num_envs)):
            raise ValueError(
                f"the instances share their attributes, so that {attr_name!r} cannot be set for some of them: "
                "leave out indices"
            )
        setattr(self.envs.unwrapped, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> Any:
        """Call a method once and return its result for each of the instances.

        Raises:
            AttributeError: If the method does not return a result for each instance.
        """
        if method_name not in _PER_INSTANCE_METHODS:
            raise AttributeError(
                f"{method_name!r} cannot be called for each instance, as they run together: env_method supports "
                f"{', '.join(_PER_INSTANCE_METHODS)}"
            )
        results = getattr(self.envs.unwrapped, method_name)(*method_args, **method_kwargs)
        return [results[row] for row in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gymnasium.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """Return False for each of the instances, which are not separate environments."""
        return [False for _ in self._get_indices(indices)]

    def _merged_options(self) -> dict[str, Any] | None:
        keys = {key for options in self._options for key in options}
        return {key: [options.get(key) for options in self._options] for key in keys} or None


def _split(infos: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Split the infos of a vector environment into one dict for each instance.

    Masks decide which instances have a key. Dicts added by wrappers lack masks; there, each instance has every key.
    """
    rows: list[dict[str, Any]] = [{} for _ in range(count)]
    for key, values in infos.items():
        if key.startswith("_"):
            continue
        parts = _split(values, count) if isinstance(values, dict) else values
        for row in np.flatnonzero(infos.get(f"_{key}", np.ones(count))).tolist():
            part = parts[row]
            rows[row][key] = part.item() if isinstance(part, np.generic) else part
    return [as_arrays(row) for row in rows]
