"""Many episodes of pruning in stages at once, in lock-step: one pass through the language model serves them all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector.utils import batch_space

from grip_env.envs.episodes import NOTHING_FIXED, ActionMode, Fixed, ObsDtype, Observation, SelectionRules
from grip_env.envs.progressive import draw_stages
from grip_env.envs.rewards import Reward
from grip_env.envs.sampling import Budget
from grip_env.envs.schedule import total_budget
from grip_env.envs.selection import RenderMode
from grip_env.envs.stages import StagedEpisode, StageRollout, StageRules
from grip_env.envs.vector import TokenSelectionVectorEnv
from grip_env.tasks.base import Task
from grip_env.vlms.base import FrozenVLM

__all__ = ["ProgressivePruningVectorEnv"]


class ProgressivePruningVectorEnv(TokenSelectionVectorEnv):
    """``num_envs`` instances of :class:`~grip_env.envs.progressive.ProgressivePruningEnv` in lock-step.

    Environment i, seeded with s, goes through the same episodes as a single environment seeded with s + i (hidden
    states and rewards up to float rounding, as batches are summed in another order). Seeds and options are handled as
    in :class:`~grip_env.envs.vector.TokenSelectionVectorEnv`. Every episode has as many steps as there are stages, so
    all end together; that step begins the next ones (``AutoresetMode.SAME_STEP``): the observations returned belong
    to the new episodes, ``infos["final_obs"]`` (object (num_envs,) of dicts) and ``infos["final_info"]`` to those that
    ended, with the ``_key`` masks of Gymnasium. Lists such as ``kept`` come as object arrays of lists.

    Args:
        num_envs: How many instances.
        vlm: See the single environment, also for the arguments that follow.
        task: Where instances come from.
        split: Which split of the task.
        stages: Decoder layers before which tokens can be dropped.
        budget: Share of the tokens, mean over all layers; ranges and lists are drawn from separately for each instance.
        stage_budgets: Instead, a share for each stage.
        action_mode: "binary" or "scores"; actions have shape (num_envs, N).
        reward: A name or an object.
        over_budget_penalty: Charged for each token over budget.
        question_aware: Whether the agent sees the question.
        attention: Whether the agent sees ``attention``.
        render_mode: ``None`` or "rgb_array".
        max_tokens: N.
        max_question_tokens: Q.
        cache_size: How many encoded examples to keep in memory.
        feature_dim: F, the width that features have in observations; D by default.
        obs_dtype: Precision of those features, "float32" or "float16".
        max_episode_steps: As for ``gymnasium.make``; at the number of stages, which is the least, all episodes are
            truncated as well as terminated, and above nothing changes.

    Raises:
        NotImplementedError: As the single environment.
        ValueError: As the single environment, and if ``num_envs`` is below 1 or ``max_episode_steps`` below the number
            of stages.

    ```python
    import gymnasium
    import grip_env

    envs = gymnasium.make_vec("GRIP/ProgressivePruning-v0", num_envs=8, stage_budgets=(0.5, 0.2, 0.05))
    observations, infos = envs.reset(seed=0)
    for _ in range(3):
        observations, rewards, terminated, truncated, infos = envs.step(envs.action_space.sample())
    print(rewards, infos["final_info"]["flops_saved"])
    ```
    """

    rules: SelectionRules

    def __init__(
        self,
        num_envs: int = 1,
        vlm: FrozenVLM | str = "tiny",
        task: Task | str = "scenes",
        split: str = "train",
        stages: Sequence[int] = (0, 1, 2),
        budget: Budget | None = None,
        stage_budgets: Sequence[float] | None = None,
        action_mode: ActionMode = "binary",
        reward: Reward | str = "log_likelihood",
        over_budget_penalty: float = 0.0,
        question_aware: bool = True,
        attention: bool = False,
        render_mode: RenderMode | None = None,
        max_tokens: int | None = None,
        max_question_tokens: int = 24,
        cache_size: int = 256,
        feature_dim: int | None = None,
        obs_dtype: ObsDtype = "float32",
        max_episode_steps: int | None = None,
    ) -> None:
        super().__init__(
            num_envs=num_envs,
            vlm=vlm,
            task=task,
            split=split,
            budget=total_budget(budget, stage_budgets),
            action_mode=action_mode,
            reward=reward,
            over_budget_penalty=over_budget_penalty,
            question_aware=question_aware,
            render_mode=render_mode,
            max_tokens=max_tokens,
            max_question_tokens=max_question_tokens,
            cache_size=cache_size,
            feature_dim=feature_dim,
            obs_dtype=obs_dtype,
            max_episode_steps=max_episode_steps,
        )
        self.stages = StageRules(self.rules, stages, stage_budgets, attention)
        steps = len(self.stages.schedule)
        if max_episode_steps is not None and max_episode_steps < steps:
            raise ValueError(
                f"max_episode_steps must be at least {steps}, the number of stages and the length of an episode; got "
                f"{max_episode_steps}"
            )
        self.single_observation_space = self.stages.observation_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._rollout: StageRollout | None = None
        self._drawn: list[StagedEpisode] = []

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode everywhere.

        Args:
            seed: An integer s seeds instance i with s + i; a list has one seed (or ``None``: go on) for each.
            options: "index" and "budget" as in the single environment: one value for all, or a list with one
                for each.
        """
        requests = self._start_over(seed, options)
        self._rollout = None
        rollout = self._begin(requests)
        self._drawn = rollout.episodes
        return self._stacked(rollout), self._infos(map(self.stages.start_info, rollout.episodes))

    def step(self, actions: np.ndarray) -> tuple[Observation, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Decide the current stage of every episode; after the last, begin the next ones.

        Args:
            actions: (num_envs, N).
        """
        rollout = self._rollout
        if rollout is None or rollout.ended:
            raise gymnasium.error.ResetNeeded("there are no episodes; call reset() before step()")
        checked = self.rules.check_action(actions, (self.num_envs, self.rules.max_tokens))
        rewards = np.array(rollout.step(checked, self._generators), dtype=np.float64)
        self._drawn = rollout.episodes
        over = np.full(self.num_envs, rollout.ended)
        truncated = over & (self.max_episode_steps == len(self.stages.schedule))
        infos = [self.stages.step_info(staged) for staged in rollout.episodes]
        if rollout.ended:
            pairs = zip(rollout.observe(), infos, strict=True)
            infos = [{"final_obs": observation, "final_info": info} for observation, info in pairs]
            rollout = self._begin(self._requests([NOTHING_FIXED] * self.num_envs))
            starts = map(self.stages.start_info, rollout.episodes)
            infos = [ended | start for ended, start in zip(infos, starts, strict=True)]
        return self._stacked(rollout), rewards, over, truncated, self._infos(infos)

    def render(self) -> tuple[np.ndarray, ...] | None:
        """Draw each instance as the last step left it (after a reset: the new episodes)."""
        if self.render_mode is None:
            gymnasium.logger.warn("render() draws nothing without a render_mode: pass render_mode='rgb_array'")
            return None
        if self._rollout is None:
            raise gymnasium.error.ResetNeeded("there are no episodes to draw; call reset() before render()")
        return tuple(draw_stages(self.stages, staged) for staged in self._drawn)

    def _fixed(self, options: dict[str, Any] | None) -> list[Fixed]:
        return [self.stages.check_fixed(fixed) for fixed in super()._fixed(options)]

    def _begin(self, requests: Sequence[tuple[int, float]]) -> StageRollout:
        self._rollout = self.stages.begin(requests)
        return self._rollout

    def _stacked(self, rollout: StageRollout) -> Observation:
        rows = rollout.observe()
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}

    def _infos(self, each: Iterable[dict[str, Any]]) -> dict[str, Any]:
        infos: dict[str, Any] = {}
        for i, info in enumerate(each):
            infos = self._add_info(infos, info, i)
        return infos
