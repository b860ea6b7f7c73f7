"""Environments of token selection on a coarse grid, small enough to know the optimum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from grip_env.common.lru import LRU
from grip_env.envs.core.checks import as_options, check_flag, check_whole, is_whole
from grip_env.envs.core.rules import ActionMode, Decision, Episode, Fixed, ObsDtype, resolve_vlm
from grip_env.envs.core.single_env import EpisodeEnv, RenderMode, own_arguments
from grip_env.envs.selection import SelectionRules, TokenSelectionEnv, TokenSelectionVectorEnv
from grip_env.exact.reward_table import RewardTable, count_subsets
from grip_env.rewards.terms import Reward
from grip_env.tasks.base import Task
from grip_env.vlms.base import FrozenVLM
from grip_env.vlms.blocks import BlockVLM, check_grid
from grip_env.vlms.cache.tables import resolve_table_cache

__all__ = ["SmallSelectionEnv", "SmallSelectionVectorEnv"]


@dataclass
class SmallEpisode(Episode):
    """Episode that also counts by how many blocks the action was short of k."""

    under_budget: int = 0


class SmallRules(SelectionRules):
    """Rules of the small environments.

    The arguments are those of :class:`SmallSelectionEnv`.
    """

    def __init__(
        self,
        *,
        vlm: FrozenVLM | str,
        k: int | list[int],
        grid: tuple[int, int],
        enumerate: bool,
        table_cache: str | Path | None,
        cache_size: int,
        **arguments: Any,
    ) -> None:
        if not isinstance(grid, Sequence) or len(grid) != 2 or not all(map(is_whole, grid)):
            raise ValueError(f"grid must be two whole numbers, rows and columns; got {grid!r}")
        if not isinstance(table_cache, str | PathLike | None):
            raise ValueError(f"table_cache must be a folder, 'auto' or None; got {table_cache!r}")
        check_whole("cache_size", cache_size, 0)
        check_flag("enumerate", enumerate)
        self.blocks = check_grid(*grid)
        self.enumerate = enumerate
        if isinstance(k, list) and not k:
            raise ValueError("the list of k is empty: give at least one number of blocks, such as [2, 4]")
        shares = [self._share(size) for size in k] if isinstance(k, list) else self._share(k)
        model = BlockVLM(resolve_vlm(vlm), *grid)
        self._cache = resolve_table_cache(table_cache, model) if enumerate else None
        self._tables: LRU[tuple[int, int], RewardTable] = LRU(cache_size)
        fixed: dict[str, Any] = {"budget": shares, "max_tokens": self.blocks, "cache_size": cache_size}
        super().__init__(vlm=model, **(arguments | fixed))

    def _share(self, k: Any) -> float:
        """Return k as a share of the blocks, after checking that it is possible."""
        if not isinstance(k, int | np.integer) or isinstance(k, bool) or not 1 <= k <= self.blocks:
            raise ValueError(f"k is how many of the {self.blocks} blocks to keep, from 1 to {self.blocks}; got {k!r}")
        if self.enumerate:
            try:
                count_subsets(self.blocks, int(k))
            except ValueError as error:
                raise ValueError(f"{error}, or pass enumerate=False to do without the optimum") from None
        return int(k) / self.blocks

    def check_options(self, options: dict[str, Any] | None) -> Fixed:
        """Return the values that the options of a reset, "index" and "k", fix."""
        given = as_options(options, ("index", "k"))
        k = given.pop("k", None)
        return super().check_options(given if k is None else given | {"budget": self._share(k)})

    def advance(self, decisions: Sequence[Decision] = (), requests: Sequence[tuple[int, float]] = ()) -> list[Episode]:
        """Carry out decisions and begin episodes; see :class:`SelectionRules`."""
        begun = super().advance(decisions, requests)
        return [
            SmallEpisode(episode.instance, min(round(share * self.blocks), int(episode.instance.real.sum())))
            for episode, (_, share) in zip(begun, requests, strict=True)
        ]

    def decide(self, episode: Episode, action: np.ndarray, generator: np.random.Generator) -> Decision:
        """Turn a checked action into a selection of exactly k blocks, as a decision.

        Blocks in excess of k are dropped at random, and missing ones are drawn at random.
        """
        assert isinstance(episode, SmallEpisode)
        decision = super().decide(episode, action, generator)
        episode.under_budget = episode.k - int(decision.selection.sum())
        if episode.under_budget:
            spare = np.flatnonzero(episode.instance.real & ~decision.selection)
            decision.selection[generator.choice(spare, episode.under_budget, replace=False)] = True
        return decision

    def info(self, episode: Episode) -> dict[str, Any]:
        """Return the info of a reset or a step."""
        assert isinstance(episode, SmallEpisode)
        info = super().info(episode) | {"under_budget": episode.under_budget}
        if not self.enumerate:
            return info
        optimum = {"optimal_reward": 0.0, "optimality_gap": 0.0, "percentile": 0.0}
        if episode.outcome is not None:
            table, selection = self.table(episode), episode.selection
            optimum = {
                "optimal_reward": table.optimal_reward,
                "optimality_gap": table.optimality_gap(selection),
                "percentile": table.percentile(selection),
            }
        return info | optimum

    def table(self, episode: Episode) -> RewardTable:
        """Return the rewards of all selections of an episode's instance.

        They are scored now unless found in memory or on disk.
        """
        instance, key = episode.instance, (episode.instance.index, episode.k)
        table = self._tables.get(key)
        if table is None:
            table = RewardTable.enumerate(
                self.vlm, instance.encoded, episode.k, self.reward, instance.full, self._cache
            )
            self._tables.put(key, table)
        return table


class SmallSelectionEnv(TokenSelectionEnv):
    """Environment in which one action selects k blocks of the image and the optimum is known.

    ## Description

    :class:`~grip_env.envs.selection.TokenSelectionEnv` with N = rows x columns blocks in place of visual tokens, 16
    by default. Keeping a block lets all visual tokens in it into the language model, as they are (see
    :class:`~grip_env.vlms.blocks.BlockVLM`): the frozen model, its answers and rewards are real. All C(N, k)
    selections are scored, so that each reward can be compared with the optimum.

    Dimensions: B instances, N blocks, D width, Q question tokens, k kept blocks.

    ## Action Space

    As in that environment, ``action_mode="binary"`` or "scores" over the blocks, but **exactly k** blocks are kept:

    - if more than k are chosen, k of them are kept uniformly at random; ``info["over_budget"]`` is the excess;
    - if fewer than k are chosen, blocks drawn uniformly at random from the others are added;
      ``info["under_budget"]`` is their number.

    The optimum is over all selections of exactly k. An action that kept fewer could beat the "optimum", as more tokens
    are not always better; so every episode ends in one of the selections that the optimum is over.

    ## Observation Space

    As in that environment; a row of ``tokens`` is the mean of a block's visual tokens, a row of ``positions`` its
    centre. Blocks that hold no token are padding.

    ## Starting State

    As in that environment. ``reset(options={"index": 3, "k": 2})`` fixes either or both for one episode.

    ## Rewards

    As in that environment. The quantities below do not include ``over_budget_penalty``.

    ## Episode End

    After one step.

    ## Information

    As in that environment, with blocks in ``kept`` and ``relevant`` (a block is as relevant as its most relevant
    token). Also ``under_budget`` (int) and, unless ``enumerate=False``, the following, which are 0.0 after ``reset``:

    - ``optimal_reward`` (float): the largest reward of any selection of k blocks;
    - ``optimality_gap`` (float): by how much the reward of the blocks kept is below it, 0 for the best;
    - ``percentile`` (float): the share of selections with a smaller reward plus half of those with the same reward,
      itself included; on average 0.5 for random actions.

    They are looked up in a table of all selections (:class:`~grip_env.exact.reward_table.RewardTable`), made when an
    instance's first episode with this k ends. By default these are 1,820 selections, which take about four seconds of
    one CPU core; for 8 of 16 blocks, 12,870 and a minute. The table is kept on disk, so it is made once. Its rewards
    are scored in other batches than those of the step: ``optimality_gap`` and ``optimal_reward - reward`` agree to
    1e-4.

    ## Arguments

    Args:
        vlm: The frozen model, whose visual tokens are grouped into blocks, or a name or folder.
        task: Source of the instances; see :class:`~grip_env.envs.selection.TokenSelectionEnv`.
        split: Name of the split.
        k: Number of blocks to keep, or a list to draw from uniformly for each episode. If fewer blocks of an image
            hold tokens, all of these are kept.
        grid: Rows and columns of blocks.
        action_mode: "binary" or "scores".
        reward: A name or an object.
        over_budget_penalty: Penalty for each block by which a binary action is over budget.
        question_aware: Whether the agent sees the question.
        render_mode: ``None``, "rgb_array" or "human".
        max_question_tokens: Q.
        cache_size: Number of encoded examples, and of tables, to keep in memory.
        feature_dim: F, the width of features in observations; D by default.
        obs_dtype: Precision of these features, "float32" or "float16".
        examples: Number of first examples of the split, or list of indices, to evaluate on in a fixed order; see
            Starting State of :class:`~grip_env.TokenSelectionEnv`.
        enumerate: Whether to score all selections.
        table_cache: Folder where scores of all selections are kept between runs; "auto" is ``grip_env/tables`` in
            ``$XDG_CACHE_HOME`` or ``~/.cache`` (for models that have a ``fingerprint()``, such as those of
            transformers); ``None`` keeps them in memory only.

    Raises:
        ValueError: As :class:`~grip_env.envs.selection.TokenSelectionEnv`; if k is not from 1 to N, or there are more
            than 50,000 selections to enumerate; if ``table_cache`` is a file, or a folder for a model without a
            ``fingerprint()``.

    ```python
    import gymnasium
    import grip_env

    env = gymnasium.make("GRIP/SmallSelection-v0", k=2, action_mode="scores")
    observation, info = env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
    print(reward, info["optimal_reward"], info["optimality_gap"], info["percentile"])
    ```
    """

    rules_class = SmallRules

    def __init__(
        self,
        vlm: FrozenVLM | str = "tiny",
        task: Task | str = "scenes",
        split: str = "train",
        k: int | list[int] = 4,
        grid: tuple[int, int] = (4, 4),
        action_mode: ActionMode = "binary",
        reward: Reward | str = "log_likelihood",
        over_budget_penalty: float = 0.0,
        question_aware: bool = True,
        render_mode: RenderMode | None = None,
        max_question_tokens: int = 24,
        cache_size: int = 256,
        feature_dim: int | None = None,
        obs_dtype: ObsDtype = "float32",
        examples: int | Sequence[int] | None = None,
        enumerate: bool = True,
        table_cache: str | Path | None = "auto",
    ) -> None:
        EpisodeEnv.__init__(self, **own_arguments(locals()))  # the parent's constructor has other arguments


class SmallSelectionVectorEnv(TokenSelectionVectorEnv, single=SmallSelectionEnv):
    """Vector environment of :class:`SmallSelectionEnv`, encoded and scored together.

    Seeds, autoreset and infos are as in :class:`~grip_env.envs.selection.TokenSelectionVectorEnv`; tables are made for
    one instance after another.

    Args:
        num_envs: Number of instances.
        options: The arguments of the single environment, with the same names and defaults; from a list, ``k`` is drawn
            separately for each instance. Actions have shape (num_envs, N).
        max_episode_steps: See :class:`~grip_env.envs.selection.TokenSelectionVectorEnv`.
        autoreset_mode: See :class:`~grip_env.envs.core.vector_env.EpisodeVectorEnv`.

    Raises:
        ValueError: As the single environment, and if ``num_envs`` or ``max_episode_steps`` is below 1.
    """
