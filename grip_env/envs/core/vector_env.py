"""Base class of the vector environments, which batch the calls of the language model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from grip_env.envs.core.autoreset import resolve_autoreset_mode, warn_of_idle_steps
from grip_env.envs.core.checks import MOST, as_seed, check_whole
from grip_env.envs.core.rules import (
    NOTHING_FIXED,
    Episode,
    Fixed,
    Observation,
)
from grip_env.envs.core.sampling import EpisodeStream, FixedEpisodes
from grip_env.envs.core.single_env import EpisodeEnv, RenderMode
from grip_env.tasks.base import Example

__all__ = ["EpisodeVectorEnv", "stack_infos", "stack_observations"]


class EpisodeVectorEnv(VectorEnv[Observation, np.ndarray, np.ndarray]):
    """Base class of the vector environments, with the decision process of a single environment.

    ``class Mine(EpisodeVectorEnv, single=MyEnv)`` takes the arguments of ``MyEnv``, with their defaults, between
    ``num_envs`` and ``max_episode_steps``; ``help()`` and :func:`inspect.signature` show them all.

    Environment i, seeded with s, goes through the same episodes as a single environment seeded with s + i. When an
    episode ends, ``autoreset_mode`` (also an attribute and a key of ``metadata``) determines how the next one begins:

    - ``AutoresetMode.SAME_STEP``, the default: in the same step. The observation returned belongs to the new episode,
      ``infos["final_obs"]`` (object (num_envs,) of dicts) and ``infos["final_info"]`` to the one that ended, with the
      ``_key`` masks of Gymnasium.
    - ``AutoresetMode.NEXT_STEP``: in the next step, whose action is ignored and whose reward is 0. With one-step
      episodes that is every second step, and as a reward of 0 means that nothing was lost, a mean over steps looks too
      good; a warning says so. Average over episodes.
    - ``AutoresetMode.DISABLED``: by ``reset(options={"reset_mask": terminated | truncated})``.

    Gymnasium's vector wrappers of observations accept the latter two only. Results are as those of
    ``gymnasium.vector.SyncVectorEnv``, but the arrays in ``final_obs`` share memory and are read-only: copy them.

    Args:
        num_envs: Number of instances.
        render_mode: ``None`` or "rgb_array".
        max_episode_steps: An episode is truncated at this step, as by ``gymnasium.wrappers.TimeLimit``; ``None``
            sets no limit.
        autoreset_mode: One of the three, or its name, such as "NextStep" (which survives JSON in a spec).
        options: The other arguments of the single environment.

    Raises:
        TypeError: If an argument is unknown.
        ValueError: If a mode is unknown, or ``num_envs`` or ``max_episode_steps`` is below 1.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 (declared so by Gymnasium)
        "render_modes": ["rgb_array"],
        "render_fps": 2,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    single: ClassVar[type[EpisodeEnv[Any]]]
    """Class of the single environment that is vectorised."""
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, single: type[EpisodeEnv[Any]] | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if single is not None:
            cls.single, cls.__signature__ = single, _with_clock(inspect.signature(single))
        if "__init__" in vars(cls):  # the subclass defines its own
            cls.__signature__ = _without_first(inspect.signature(cls.__init__))

    def __init__(self, *positional: Any, **options: Any) -> None:
        try:
            bound = _with_clock(inspect.signature(self.single)).bind(*positional, **options)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}: {error}") from None
        bound.apply_defaults()
        self._set_up(**bound.arguments)

    def _set_up(
        self,
        num_envs: int,
        render_mode: RenderMode | None,
        max_episode_steps: int | None,
        autoreset_mode: AutoresetMode | str,
        **arguments: Any,
    ) -> None:
        self.autoreset_mode = resolve_autoreset_mode(autoreset_mode)
        self.metadata = self.metadata | {"autoreset_mode": self.autoreset_mode}
        check_whole("num_envs", num_envs, 1, MOST)
        check_whole("max_episode_steps", 1 if max_episode_steps is None else max_episode_steps, 1)
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode must be None or 'rgb_array'; got {render_mode!r}")
        self.rules = self.single.rules_class(**arguments)
        if self.rules.examples is not None and len(self.rules.examples) < num_envs:
            raise ValueError(
                f"{num_envs} environments cannot share {len(self.rules.examples)} examples: give more examples, "
                "or make fewer environments"
            )
        self.max_episode_steps = max_episode_steps
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.single_observation_space = self.rules.observation_space
        self.single_action_space = self.rules.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._generators, self._seeds = self._seeded([None] * num_envs)
        self._streams: list[EpisodeStream | FixedEpisodes | None] = [None] * num_envs
        self._episodes: list[Episode] = []
        self._shown: list[Episode] = []
        self._ended = np.zeros(num_envs, dtype=bool)
        if self.rules.one_step and self.autoreset_mode is AutoresetMode.NEXT_STEP:
            warn_of_idle_steps(self)

    @staticmethod
    def _seeded(seeds: Sequence[int | None]) -> tuple[list[np.random.Generator], list[int]]:
        pairs = [seeding.np_random(seed) for seed in seeds]
        return [generator for generator, _ in pairs], [seed for _, seed in pairs]

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """Random generator of each instance."""
        return tuple(self._generators)

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """Seed of each instance."""
        return tuple(self._seeds)

    @property
    def example(self) -> tuple[Example, ...]:
        """Example of each instance's episode: image, question, answer and kind of question.

        Raises:
            gymnasium.error.ResetNeeded: Before the first reset.
        """
        if not self._episodes:
            raise gymnasium.error.ResetNeeded("there are no episodes; call reset() before asking for their examples")
        return tuple(episode.instance.example for episode in self._episodes)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode in every instance, or in those that a mask selects.

        Args:
            seed: An integer s seeds instance i with s + i; a list has one seed for each (``None``: not seeded). With
                ``examples``, all start over, whatever the seeds.
            options: "index" and "budget" as in the single environment: one value for all, or a list with one
                for each. "reset_mask", bool (num_envs,), selects the instances that begin an episode and, with
                ``seed``, are seeded; the others continue, and the ``_key`` masks mark their infos as missing.

        Raises:
            ValueError: If the number of seeds or options is not ``num_envs``, or a seed, an option or the mask is
                invalid; the state is then unchanged.
            IndexError: If there is no such index.
            gymnasium.error.ResetNeeded: If a mask leaves out instances that never began.
        """
        chosen, others = None, options
        if isinstance(options, Mapping):
            chosen = options.get("reset_mask")
            others = {key: value for key, value in options.items() if key != "reset_mask"}
        seeds, fixed, mask = self._each_seed(seed), self._fixed(others), self._reset_mask(chosen)
        rows = np.flatnonzero(mask).tolist()
        # a trainer's evaluation begins with a reset of all instances, never with a mask
        anew = self.rules.examples is not None and chosen is None
        for i in rows:
            own = seeds[i]
            if own is not None:
                (self._generators[i],), (self._seeds[i],) = self._seeded([own])
            if own is not None or self._streams[i] is None or anew:
                self._streams[i] = self.rules.stream(self._generators[i], i, self.num_envs)
        requests = [self._request(i, fixed[i]) for i in rows]
        if mask.all():
            self._episodes = self._shown = []
        fresh = dict(zip(rows, self.rules.advance(requests=requests), strict=True))
        self._episodes, self._shown = (
            [fresh[i] if i in fresh else episodes[i] for i in range(self.num_envs)]
            for episodes in (self._episodes, self._shown)
        )
        self._ended = self._ended & ~mask
        infos = [self.rules.info(fresh[i]) if i in fresh else None for i in range(self.num_envs)]
        return self._observe(), stack_infos(infos)

    def step(self, actions: np.ndarray) -> tuple[Observation, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Take a step in every episode, and begin new episodes as ``autoreset_mode`` says.

        Args:
            actions: (num_envs, *shape of one action).

        Raises:
            ValueError: If an action is invalid; actions of instances that begin an episode instead are ignored.
            gymnasium.error.ResetNeeded: Before the first reset, and after the end of an episode where autoreset is
                disabled.
        """
        if not self._episodes:
            raise gymnasium.error.ResetNeeded("there are no episodes; call reset() before step()")
        mode, idle = self.autoreset_mode, self._ended  # (B,)
        if mode is AutoresetMode.DISABLED and idle.any():
            raise gymnasium.error.ResetNeeded(
                f"the episodes of instances {np.flatnonzero(idle).tolist()} have ended, and autoreset is disabled: "
                'call reset(options={"reset_mask": terminated | truncated}) before step()'
            )
        shape = self.action_space.shape or ()
        checked = self.rules.check_action(_without(actions, idle, shape), shape)
        stepped, limit = self._episodes, self.max_episode_steps
        acting = np.flatnonzero(~idle).tolist()
        chances = {i: self.rules.chance(stepped[i], self._generators[i]) for i in acting}
        decisions = [self.rules.decide(stepped[i], checked[i], chances[i]) for i in acting]
        terminated, truncated = np.zeros_like(idle), np.zeros_like(idle)  # (B,)
        terminated[acting] = [decision.ends for decision in decisions]
        truncated[acting] = [limit is not None and stepped[i].steps + 1 >= limit for i in acting]
        ended = terminated | truncated
        same_step = mode is AutoresetMode.SAME_STEP
        beginning = np.flatnonzero(ended if same_step else idle).tolist()
        begun = self.rules.advance(decisions, [self._request(i) for i in beginning])
        fresh = dict(zip(beginning, begun, strict=True))
        self._episodes = [fresh.get(i, episode) for i, episode in enumerate(stepped)]
        self._shown = stepped if same_step else self._episodes
        self._ended = np.zeros_like(ended) if same_step else ended
        if mode is AutoresetMode.NEXT_STEP and any(stepped[i].steps == 1 for i in np.flatnonzero(ended)):
            warn_of_idle_steps(self, every=False)
        infos = [self.rules.info(episode) for episode in (stepped if same_step else self._episodes)]
        if same_step:
            for i, episode in fresh.items():
                final = {"final_obs": self.rules.read_only_view(stepped[i]), "final_info": infos[i]}
                infos[i] = final | self.rules.info(episode)
        rewards = np.zeros(self.num_envs)  # (B,)
        rewards[acting] = [stepped[i].reward for i in acting]
        return self._observe(), rewards, terminated, truncated, stack_infos(infos)

    def render(self) -> tuple[np.ndarray, ...] | None:
        """Draw the outcome of the last step in each instance; after a reset, the new episodes."""
        if self.render_mode is None:
            gymnasium.logger.warn("render() draws nothing without a render_mode: pass render_mode='rgb_array'")
            return None
        if not self._episodes:
            raise gymnasium.error.ResetNeeded("there are no episodes to draw; call reset() before render()")
        return tuple(self.single.draw(self.rules, episode) for episode in self._shown)

    def _each_seed(self, seed: Any) -> list[int | None]:
        if seed is None:
            return [None] * self.num_envs
        if not _is_list(seed):
            first = as_seed(seed)
            assert first is not None
            return [first + i for i in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise ValueError(f"{len(seed)} seeds for {self.num_envs} environments: give one for each")
        return [as_seed(own) for own in seed]

    def _reset_mask(self, given: Any) -> np.ndarray:
        """Return the mask of the instances to reset, bool (num_envs,)."""
        if given is None:
            return np.ones(self.num_envs, dtype=bool)
        try:
            mask = np.array(given)
        except Exception:  # e.g. ragged lists, or tensors on other devices
            mask = np.zeros(0)
        if mask.dtype != bool or mask.shape != (self.num_envs,) or not mask.any():
            raise ValueError(
                f"the reset option 'reset_mask' is bool ({self.num_envs},), one entry for each environment, with at "
                f"least one True; got {given!r}"
            )
        if not self._episodes and not mask.all():
            raise gymnasium.error.ResetNeeded(
                "there are no episodes yet; call reset() without 'reset_mask' for the first time"
            )
        return mask

    def _fixed(self, options: dict[str, Any] | None) -> list[Fixed]:
        if not isinstance(options, Mapping):
            return [self.rules.check_options(options)] * self.num_envs
        shared = dict(options)
        lists = {key: shared.pop(key) for key in list(shared) if _is_list(shared[key])}
        for key, values in lists.items():
            if len(values) != self.num_envs:
                raise ValueError(
                    f"the reset option {key!r} has {len(values)} values for {self.num_envs} environments: "
                    "give one for each, or a single value for all"
                )
        return [
            self.rules.check_options(shared | {key: values[i] for key, values in lists.items()})
            for i in range(self.num_envs)
        ]

    def _request(self, i: int, fixed: Fixed = NOTHING_FIXED) -> tuple[int, float]:
        stream = self._streams[i]
        assert stream is not None
        return self.rules.request(stream, fixed)

    def _observe(self) -> Observation:
        return stack_observations([self.rules.shared_view(episode) for episode in self._episodes])


def _with_clock(single: inspect.Signature) -> inspect.Signature:
    """Return the signature of a vector environment, given that of its single environment."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return single.replace(
        parameters=[
            inspect.Parameter("num_envs", kind, default=1, annotation="int"),
            *single.parameters.values(),
            inspect.Parameter("max_episode_steps", kind, default=None, annotation="int | None"),
            inspect.Parameter(
                "autoreset_mode", kind, default=AutoresetMode.SAME_STEP, annotation="AutoresetMode | str"
            ),
        ]
    )


def _without_first(method: inspect.Signature) -> inspect.Signature:
    """Return the signature of a method without its first parameter, ``self``."""
    return method.replace(parameters=list(method.parameters.values())[1:])


def _is_list(value: Any) -> bool:
    """Return whether a value is a list or array with one entry for each environment."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _without(actions: Any, idle: np.ndarray, shape: tuple[int, ...]) -> Any:
    """Return actions with a zero for each idle instance, whose action is ignored."""
    if not idle.any():
        return actions
    try:
        given = np.array(actions)
    except Exception:  # check_action() reports what is wrong
        return actions
    if given.shape != shape or given.dtype.kind not in "biuf" or np.ma.is_masked(actions):
        return actions
    given[idle] = 0
    return given


def stack_observations(rows: Sequence[Observation]) -> Observation:
    """Return a copy of the observations, stacked into one array (B, ...) for each key.

    >>> stack_observations([{"budget": np.array([0.5])}, {"budget": np.array([0.25])}])["budget"].tolist()
    [[0.5], [0.25]]
    """
    stacked: Observation = {}
    for key, first in rows[0].items():
        column = np.empty((len(rows), *first.shape), dtype=first.dtype)
        for place, row in zip(column, rows, strict=True):
            place[:] = row[key]
        stacked[key] = column
    return stacked


def stack_infos(infos: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """Stack infos into an array (B, ...) and a mask ``_key``, bool (B,), for each key.

    Numbers and arrays become arrays of their type, 0 where an instance lacks the key; dicts are stacked recursively;
    the rest, and the dicts in ``final_obs``, become arrays of objects, as in Gymnasium's ``VectorEnv._add_info``.

    Args:
        infos: One for each instance; ``None`` stands for an empty one. All values of a key have the same type.

    >>> stacked = stack_infos([{"k": 3}, {"kept": [1, 2]}])
    >>> stacked["k"].tolist(), stacked["_k"].tolist(), stacked["kept"].tolist()
    ([3, 0], [True, False], [None, [1, 2]])
    """
    stacked: dict[str, Any] = {}
    given = [{} if info is None else info for info in infos]
    alike = all(info.keys() == given[0].keys() for info in given)  # the usual case
    for key in given[0] if alike else dict.fromkeys(key for info in given for key in info):
        known = np.ones(len(given), dtype=bool) if alike else np.array([key in info for info in given])
        values = [info[key] for info in given if alike or key in info]
        stacked[key] = (
            stack_infos([info.get(key) for info in given])
            if isinstance(values[0], dict) and key != "final_obs"
            else _column(values, known)
        )
        stacked[f"_{key}"] = known
    return stacked


def _column(values: list[Any], known: np.ndarray) -> np.ndarray:
    first = values[0]
    if isinstance(first, bool | int | float | np.number):
        column = np.zeros(len(known), dtype=type(first))
        column[known] = values
    elif isinstance(first, np.ndarray):
        column = np.zeros((len(known), *first.shape), dtype=first.dtype)
        column[known] = values
    else:
        column = np.full(len(known), None, dtype=object)
        for row, value in zip(np.flatnonzero(known).tolist(), values, strict=True):
            column[row] = value
    return column
