"""Many instances at once, with one call of the language model per step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from grip_env.envs.autoreset import resolve_autoreset_mode, warn_of_idle_steps
from grip_env.envs.checks import MOST, as_seed, check_whole
from grip_env.envs.episodes import (
    NOTHING_FIXED,
    ActionMode,
    Episode,
    EpisodeRules,
    Fixed,
    ObsDtype,
    Observation,
    SelectionRules,
)
from grip_env.envs.joining import joined_infos, joined_observations
from grip_env.envs.rewards import Reward
from grip_env.envs.sampling import Budget, EpisodeStream, FixedEpisodes
from grip_env.envs.single import RenderMode, draw_episode
from grip_env.tasks.base import Example, Task
from grip_env.vlms.base import FrozenVLM

__all__ = ["EpisodeVectorEnv", "TokenSelectionVectorEnv"]


class EpisodeVectorEnv(VectorEnv[Observation, np.ndarray, np.ndarray], ABC):
    """Everything of a vector environment but its rules, which a subclass makes.

    Environment i, seeded with s, goes through the same episodes as a single environment seeded with s + i. What
    follows the end of an episode is said by ``autoreset_mode``, which is an attribute and in ``metadata`` as well:

    - ``AutoresetMode.SAME_STEP``, the default: the same step begins the next one. The observation returned belongs to
      that, ``infos["final_obs"]`` (object (num_envs,) of dicts) and ``infos["final_info"]`` to the one that ended, with
      the ``_key`` masks of Gymnasium.
    - ``AutoresetMode.NEXT_STEP``: the next step begins it; its action is ignored and it pays 0. Where episodes have one
      step that is every second step, and since a reward of 0 stands for nothing lost, a mean over steps is flattered:
      a warning says so. Average over episodes.
    - ``AutoresetMode.DISABLED``: ``reset(options={"reset_mask": terminated | truncated})`` begins it.

    Gymnasium's vector wrappers of observations take the latter two only. All is as ``gymnasium.vector.SyncVectorEnv``
    gives it, but that the arrays in ``final_obs`` are read-only, as they share memory: copy them to change them.

    Args:
        num_envs: How many instances.
        render_mode: ``None`` or "rgb_array".
        max_episode_steps: An episode is truncated at this step, as by ``gymnasium.wrappers.TimeLimit``; ``None``
            sets no limit.
        autoreset_mode: One of the three, or its name, such as "NextStep" (which survives JSON in a spec).
        arguments: Those of the rules.

    Raises:
        ValueError: If a mode is another, or ``num_envs`` or ``max_episode_steps`` is below 1.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 (declared so by Gymnasium)
        "render_modes": ["rgb_array"],
        "render_fps": 2,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
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
        self.rules = self._make_rules(**arguments)
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
            warn_of_idle_steps()

    @abstractmethod
    def _make_rules(self, **arguments: Any) -> EpisodeRules:
        """Return the decision process."""

    @staticmethod
    def _seeded(seeds: Sequence[int | None]) -> tuple[list[np.random.Generator], list[int]]:
        pairs = [seeding.np_random(seed) for seed in seeds]
        return [generator for generator, _ in pairs], [seed for _, seed in pairs]

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """The generator of each instance."""
        return tuple(self._generators)

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The seed of each instance."""
        return tuple(self._seeds)

    @property
    def example(self) -> tuple[Example, ...]:
        """The example that each instance's episode is about: picture, question, answer and kind of question.

        Raises:
            gymnasium.error.ResetNeeded: Before the first reset.
        """
        if not self._episodes:
            raise gymnasium.error.ResetNeeded("there are no episodes; call reset() before asking for their examples")
        return tuple(episode.instance.example for episode in self._episodes)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode everywhere, or where a mask says so.

        Args:
            seed: An integer s seeds instance i with s + i; a list has one seed (or ``None``: go on) for each. With
                ``examples``, all begin anew, whatever the seeds.
            options: "index" and "budget" as in the single environment: one value for all, or a list with one
                for each. "reset_mask", bool (num_envs,), says which instances begin an episode and, with ``seed``, are
                seeded; the others go on where they are. Their infos are left out, as the ``_key`` masks tell.

        Raises:
            ValueError: If there are more or fewer seeds or options than environments, or one of them or the mask is
                none; nothing is lost then.
            IndexError: If there is no such index.
            gymnasium.error.ResetNeeded: If a mask leaves out instances that never began.
        """
        chosen, others = None, options
        if isinstance(options, Mapping):
            chosen = options.get("reset_mask")
            others = {key: value for key, value in options.items() if key != "reset_mask"}
        seeds, fixed, mask = self._each_seed(seed), self._fixed(others), self._reset_mask(chosen)
        rows = np.flatnonzero(mask).tolist()
        # a trainer's evaluation begins with a reset of all of them, and one with a mask is none
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
        return self._observe(), joined_infos(infos)

    def step(self, actions: np.ndarray) -> tuple[Observation, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Act in every episode, and begin the next one where ``autoreset_mode`` says so.

        Args:
            actions: (num_envs, *shape of one action).

        Raises:
            ValueError: If an action is none; those of instances that begin an episode instead are not looked at.
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
        infos = [self.rules.info(episode) for episode in (stepped if same_step else self._episodes)]
        if same_step:
            for i, episode in fresh.items():
                final = {"final_obs": self.rules.glimpse(stepped[i]), "final_info": infos[i]}
                infos[i] = final | self.rules.info(episode)
        rewards = np.zeros(self.num_envs)  # (B,)
        rewards[acting] = [stepped[i].reward for i in acting]
        return self._observe(), rewards, terminated, truncated, joined_infos(infos)

    def render(self) -> tuple[np.ndarray, ...] | None:
        """Draw what the last step decided in each instance (after a reset: the new episodes)."""
        if self.render_mode is None:
            gymnasium.logger.warn("render() draws nothing without a render_mode: pass render_mode='rgb_array'")
            return None
        if not self._episodes:
            raise gymnasium.error.ResetNeeded("there are no episodes to draw; call reset() before render()")
        return tuple(self._draw(episode) for episode in self._shown)

    def _draw(self, episode: Episode) -> np.ndarray:
        """Return the picture of an episode, uint8 (height, width, 3)."""
        return draw_episode(episode)

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
        """Return which instances a reset is for, bool (num_envs,)."""
        if given is None:
            return np.ones(self.num_envs, dtype=bool)
        try:
            mask = np.array(given)
        except Exception:  # foreign code: of ragged lists, tensors on other devices and the like
            mask = np.zeros(0)
        if mask.dtype != bool or mask.shape != (self.num_envs,) or not mask.any():
            raise ValueError(
                f"the reset option 'reset_mask' is bool ({self.num_envs},), one entry for each environment, with at "
                f"least one True; got {given!r}"
            )
        if not self._episodes and not mask.all():
            raise gymnasium.error.ResetNeeded(
                "there are no episodes yet; call reset() without 'reset_mask' before a reset of some"
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
        return joined_observations([self.rules.view(episode) for episode in self._episodes])


def _is_list(value: Any) -> bool:
    """Tell whether a value has one part for each environment."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _without(actions: Any, idle: np.ndarray, shape: tuple[int, ...]) -> Any:
    """Return actions with a zero for each idle instance: nobody looks at what they say."""
    if not idle.any():
        return actions
    try:
        given = np.array(actions)
    except Exception:  # foreign code: the check of the actions says what is wrong
        return actions
    if given.shape != shape or given.dtype.kind not in "biuf" or np.ma.is_masked(actions):
        return actions
    given[idle] = 0
    return given


class TokenSelectionVectorEnv(EpisodeVectorEnv):
    """``num_envs`` instances of :class:`~grip_env.envs.selection.TokenSelectionEnv`, encoded and scored
    together.

    Environment i, seeded with s, goes through the same episodes as a single environment seeded with s + i.
    Every step ends all episodes and, by default, begins the next ones (``AutoresetMode.SAME_STEP``): the observations
    returned then belong to the new episodes, ``infos["final_obs"]`` (object (num_envs,) of dicts of read-only arrays)
    and ``infos["final_info"]`` to those that ended, with the ``_key`` masks of Gymnasium. Masks such as
    ``kept`` come as bool (num_envs, N).

    Args:
        num_envs: How many instances.
        vlm: See the single environment, also for the arguments that follow.
        task: Where instances come from.
        split: Which split of the task.
        budget: Share of the tokens; ranges, as tuples or mappings, and lists are drawn
            from separately for each instance.
        action_mode: "binary" or "scores"; actions have shape (num_envs, N).
        reward: A name or an object.
        over_budget_penalty: Charged for each token over budget.
        question_aware: Whether the agent sees the question.
        render_mode: ``None`` or "rgb_array".
        max_tokens: N.
        max_question_tokens: Q.
        cache_size: How many encoded examples to keep in memory.
        feature_dim: F, the width that features have in observations; D by default.
        obs_dtype: Precision of those features, "float32" or "float16".
        examples: Evaluate on these; instance i takes every ``num_envs``-th of them.
        max_episode_steps: As for ``gymnasium.make``; every episode has one step, so that at 1 all are truncated as
            well as terminated, and above nothing changes.
        autoreset_mode: ``AutoresetMode.SAME_STEP``, ``NEXT_STEP`` or ``DISABLED``, or such a name: see
            :class:`EpisodeVectorEnv`. With NEXT_STEP every second step ignores its action and pays 0, which flatters
            a mean over steps.

    Raises:
        ValueError: As the single environment, and if ``num_envs`` or ``max_episode_steps`` is below 1.

    ```python
    import gymnasium
    import grip_env

    envs = gymnasium.make_vec("GRIP/TokenSelection-v0", num_envs=8, budget=(0.05, 0.5), action_mode="scores")
    observations, infos = envs.reset(seed=0)
    observations, rewards, terminated, truncated, infos = envs.step(envs.action_space.sample())
    print(rewards, infos["final_info"]["correct"])
    ```
    """

    def __init__(
        self,
        num_envs: int = 1,
        vlm: FrozenVLM | str = "tiny",
        task: Task | str = "scenes",
        split: str = "train",
        budget: Budget = 0.1,
        action_mode: ActionMode = "binary",
        reward: Reward | str = "log_likelihood",
        over_budget_penalty: float = 0.0,
        question_aware: bool = True,
        render_mode: RenderMode | None = None,
        max_tokens: int | None = None,
        max_question_tokens: int = 24,
        cache_size: int = 256,
        feature_dim: int | None = None,
        obs_dtype: ObsDtype = "float32",
        examples: int | Sequence[int] | None = None,
        max_episode_steps: int | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
    ) -> None:
        super().__init__(
            num_envs,
            render_mode,
            max_episode_steps,
            autoreset_mode,
            vlm=vlm,
            task=task,
            split=split,
            budget=budget,
            action_mode=action_mode,
            reward=reward,
            over_budget_penalty=over_budget_penalty,
            question_aware=question_aware,
            max_tokens=max_tokens,
            max_question_tokens=max_question_tokens,
            cache_size=cache_size,
            feature_dim=feature_dim,
            obs_dtype=obs_dtype,
            examples=examples,
        )

    def _make_rules(self, **arguments: Any) -> SelectionRules:
        return SelectionRules(**arguments)
