"""Stable-Baselines3 on a vector environment of this project: its ``VecEnv``, with one call of the model per step.

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

__all__ = ["as_sb3_vec_env"]

_PER_INSTANCE = ("example", "np_random", "np_random_seed")
_PER_INSTANCE_METHODS = ("action_masks", "render")


def as_sb3_vec_env(envs: VectorEnv[Any, Any, Any]) -> VecEnv:
    """Turn a vector environment into what Stable-Baselines3 trains on.

    ``DummyVecEnv`` steps its environments in turn, with a call of the language model for each; this steps all in
    one. What it returns is what ``DummyVecEnv`` of as many single environments returns: float32 rewards, and at the
    end of an episode the info of its last step (``log_likelihood``, ``correct``, ``kept`` ...) with
    ``terminal_observation`` and ``TimeLimit.truncated``, while the observation and ``reset_infos`` belong to the
    next episode. ``action_masks`` of token-by-token episodes is found by sb3-contrib's MaskablePPO. Put
    ``VecMonitor`` around it for episode statistics (its ``info_keywords`` can be ``("log_likelihood", "correct")``).

    With ``action_mode="scores"``, give PPO and A2C ``policy_kwargs={"log_std_init": -2.0}``: they start with a
    standard deviation of 1 and clip actions to [-1, 1], so that more scores than the budget has room for are 1, and
    chance decides which of these tokens are kept. For token-by-token episodes give ``gamma=1.0``, as
    :class:`~grip_env.envs.sequential.SequentialSelectionEnv` explains.

    The instances share one set of rules: ``set_attr`` sets for all, ``get_attr`` returns the same value for each but
    for ``example``, ``np_random`` and ``np_random_seed``, and ``env_method`` knows ``action_masks`` and ``render``.

    Args:
        envs: From ``gymnasium.make_vec`` or a class of this project, wrapped or not.

    Raises:
        TypeError: If it is no ``gymnasium.vector.VectorEnv``.
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
        self._actions: list[np.ndarray] = []  # of the step that is to come
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)

    def reset(self) -> Any:
        """Begin an episode everywhere, with the seeds and options given before, which count once."""
        self._actions = []
        seeds: Any = list(self._seeds)
        observations, infos = self.envs.reset(seed=seeds, options=self._merged_options())
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = _split(infos, self.num_envs)
        return observations

    def step_async(self, actions: np.ndarray) -> None:
        """Take the actions of the next step."""
        self._actions = [actions]

    def step_wait(self) -> VecEnvStepReturn:
        """Step all instances at once."""
        if not self._actions:
            raise RuntimeError("there are no actions; call step_async() before step_wait()")
        actions = self._actions.pop()
        observations, rewards, terminated, truncated, vector_infos = self.envs.step(actions)
        infos = _split(vector_infos, self.num_envs)
        for i, done in enumerate(terminated | truncated):
            if done:
                start = infos[i]
                infos[i] = start.pop("final_info") | {"terminal_observation": start.pop("final_obs")}
                if "episode" in start:  # Gymnasium's RecordEpisodeStatistics tells of the one that ended
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
        """Tell whether the vector environment has such an attribute."""
        return hasattr(self.envs.unwrapped, attr_name)

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Return an attribute for each of the instances."""
        value, rows = getattr(self.envs.unwrapped, attr_name), self._get_indices(indices)
        return [value[row] if attr_name in _PER_INSTANCE else value for row in rows]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of the vector environment.

        Raises:
            ValueError: If it is to be set for some instances only.
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
        """Call a method once and return what it has for each of the instances.

        Raises:
            AttributeError: If it is not one that returns something for each instance.
        """
        if method_name not in _PER_INSTANCE_METHODS:
            raise AttributeError(
                f"{method_name!r} cannot be called for each instance, as they run together: env_method knows "
                f"{', '.join(_PER_INSTANCE_METHODS)}"
            )
        results = getattr(self.envs.unwrapped, method_name)(*method_args, **method_kwargs)
        return [results[row] for row in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gymnasium.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """Return False for each of the instances: they are not environments of their own."""
        return [False for _ in self._get_indices(indices)]

    def _merged_options(self) -> dict[str, Any] | None:
        keys = {key for options in self._options for key in options}
        return {key: [options.get(key) for options in self._options] for key in keys} or None


def _split(infos: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Take the infos of a vector environment apart: one dict for each instance, with what its masks say it has.

    Wrappers leave masks out inside a dict of their own; there, each instance has every key.
    """
    rows: list[dict[str, Any]] = [{} for _ in range(count)]
    for key, values in infos.items():
        if key.startswith("_"):
            continue
        parts = _split(values, count) if isinstance(values, dict) else values
        for row in np.flatnonzero(infos.get(f"_{key}", np.ones(count))).tolist():
            part = parts[row]
            rows[row][key] = part.item() if isinstance(part, np.generic) else part
    return rows
