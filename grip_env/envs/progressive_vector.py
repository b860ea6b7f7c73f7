"""Many episodes of pruning in stages at once, in lock-step: one pass through the language model serves them all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from grip_env.envs.episodes import ActionMode, Episode, ObsDtype
from grip_env.envs.progressive import draw_stages
from grip_env.envs.rewards import Reward
from grip_env.envs.sampling import Budget
from grip_env.envs.single import RenderMode
from grip_env.envs.stages import StageRules
from grip_env.envs.vector import EpisodeVectorEnv
from grip_env.tasks.base import Task
from grip_env.vlms.base import FrozenVLM

__all__ = ["ProgressivePruningVectorEnv"]


class ProgressivePruningVectorEnv(EpisodeVectorEnv):
    """``num_envs`` instances of :class:`~grip_env.envs.progressive.ProgressivePruningEnv` in lock-step.

    Environment i, seeded with s, goes through the same episodes as a single environment seeded with s + i (hidden
    states and rewards up to float rounding, as batches are summed in another order). Seeds and options are handled as
    in :class:`~grip_env.envs.vector.TokenSelectionVectorEnv`. Every episode has as many steps as there are stages, so
    all that begin together end together; by default that step begins the next ones (``AutoresetMode.SAME_STEP``): the
    observations returned then belong to the new episodes, ``infos["final_obs"]`` (object (num_envs,) of dicts of
    read-only arrays) and ``infos["final_info"]`` to those that ended, with the ``_key`` masks of Gymnasium. Masks such
    as ``kept`` come as bool (num_envs, N).

    Args:
        num_envs: How many instances.
        vlm: See the single environment, also for the arguments that follow.
        task: Where instances come from.
        split: Which split of the task.
        stages: Decoder layers before which tokens can be dropped.
        budget: Share of the tokens, mean over all layers; ranges, as tuples or mappings, and lists are drawn
            from separately for each instance.
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
        examples: Evaluate on these; instance i takes every ``num_envs``-th of them.
        max_episode_steps: As for ``gymnasium.make``; below the number of stages, no episode comes to its answer.
        autoreset_mode: See :class:`~grip_env.envs.vector.EpisodeVectorEnv`.

    Raises:
        NotImplementedError: As the single environment.
        ValueError: As the single environment, and if ``num_envs`` or ``max_episode_steps`` is below 1.

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

    rules: StageRules

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
            stages=stages,
            budget=budget,
            stage_budgets=stage_budgets,
            action_mode=action_mode,
            reward=reward,
            over_budget_penalty=over_budget_penalty,
            question_aware=question_aware,
            attention=attention,
            max_tokens=max_tokens,
            max_question_tokens=max_question_tokens,
            cache_size=cache_size,
            feature_dim=feature_dim,
            obs_dtype=obs_dtype,
            examples=examples,
        )

    def _make_rules(self, **arguments: Any) -> StageRules:
        return StageRules(**arguments)

    def _draw(self, episode: Episode) -> np.ndarray:
        return draw_stages(self.rules, episode)
