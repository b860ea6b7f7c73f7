"""Token by token: one visual token per step, until the budget is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from grip_env.envs.core.checks import as_numbers, check_flag, check_whole
from grip_env.envs.core.rules import Decision, Episode, EpisodeRules, ObsDtype, Observation, check_penalty
from grip_env.envs.core.sampling import Budget
from grip_env.envs.core.single_env import EpisodeEnv, RenderMode, own_arguments
from grip_env.envs.core.vector_env import EpisodeVectorEnv
from grip_env.rewards.terms import Reward
from grip_env.tasks.base import Task
from grip_env.vlms.base import FrozenVLM

__all__ = ["SequentialRules", "SequentialSelectionEnv", "SequentialSelectionVectorEnv", "legal_actions"]


def legal_actions(episode: Episode) -> np.ndarray:
    """Return which tokens can still be selected, bool (N,): the real ones that are not selected yet."""
    return episode.instance.real & ~episode.selection


class SequentialRules(EpisodeRules):
    """One token per step.

    The arguments are those of :class:`SequentialSelectionEnv`.
    """

    def __init__(
        self, *, dense: bool, invalid_action_penalty: float, max_invalid_actions: int | None, **common: Any
    ) -> None:
        check_penalty("invalid_action_penalty", invalid_action_penalty)
        if max_invalid_actions is not None:
            check_whole("max_invalid_actions", max_invalid_actions, 1)
        super().__init__(penalty=invalid_action_penalty, **common)
        check_flag("dense", dense)
        self.dense = dense
        self.max_invalid_actions = self.max_tokens if max_invalid_actions is None else int(max_invalid_actions)
        self.action_space = spaces.Discrete(self.max_tokens)
        self.observation_space["selected"] = spaces.MultiBinary(self.max_tokens)

    def check_action(self, action: Any, shape: tuple[int, ...]) -> np.ndarray:
        """Return ``action`` as an integer array of ``shape``.

        Raises:
            ValueError: If shape or type is another, or there is no token of that index.
        """
        each = "the index of one visual token" + " for each environment" * bool(shape)
        given = as_numbers(action, "iu", f"an integer: {each}")
        if given.shape != shape:
            raise ValueError(f"the action has shape {given.shape}, expected {shape}: {each}")
        outside = given[(given < 0) | (given >= self.max_tokens)]
        if outside.size:
            raise ValueError(f"action {outside[0]} is out of range: choose {each}, 0 to {self.max_tokens - 1}")
        return given

    def decide(self, episode: Episode, action: Any, generator: np.random.Generator) -> Decision:
        """Add a token to the selection, or nothing where the action is illegal; the episode stays as it is."""
        selection = episode.selection.copy()
        if not legal_actions(episode)[action]:
            # the model is asked about what there is: were the end free, doing nothing would pay 0, "nothing lost"
            ends = episode.violations + 1 >= self.max_invalid_actions
            return Decision(episode, selection, violations=1, scored=ends, ends=ends)
        selection[action] = True
        ends = bool(selection.sum() == episode.k)
        return Decision(episode, selection, scored=self.dense or ends, ends=ends)

    def shared_view(self, episode: Episode) -> Observation:
        """Return an observation of an episode that shares memory with others."""
        return super().shared_view(episode) | {"selected": episode.selection.astype(np.int8)}

    def info(self, episode: Episode) -> dict[str, Any]:
        """Return the info of a reset or a step."""
        mask = legal_actions(episode).astype(np.int8)
        return super().info(episode) | {"invalid_actions": episode.violations, "action_mask": mask}


class SequentialSelectionEnv(EpisodeEnv[np.int64]):
    """Choose, one at a time, which visual tokens a frozen vision-language model may see before it answers a question.

    ## Description

    The decision of :class:`~grip_env.envs.selection.TokenSelectionEnv`, taken apart: each step adds one visual
    token to the set, until the k that the budget allows are in. The set that comes out is paid as it is there.

    N visual tokens, D width, Q question tokens, k kept.

    ## Action Space

    ``Discrete(N)``: the index of the token to add. ``action_masks()`` tells which actions are legal, bool (N,): the
    real tokens that are not selected yet. sb3-contrib's MaskablePPO calls it (through wrappers:
    ``env.get_wrapper_attr("action_masks")()``); ``info["action_mask"]`` has the same as int8, as Gymnasium's own
    environments do, for ``env.action_space.sample(mask=info["action_mask"])``. An illegal action changes nothing but
    the count ``info["invalid_actions"]``, and costs ``invalid_action_penalty``; with the
    ``max_invalid_actions``-th, the episode ends.

    ## Observation Space

    A ``Dict`` of fresh arrays: those of :class:`~grip_env.envs.selection.TokenSelectionEnv` (``tokens``,
    ``token_mask``, ``positions``, ``question``, ``question_mask`` and ``budget``, which is k divided by the number of
    real tokens throughout) and

    | key | space | dtype, shape | meaning |
    |---|---|---|---|
    | selected | MultiBinary | int8 (N,) | 1 for the tokens that are in |

    ## Starting State

    No token is in. Which instance comes, and under what budget, is decided as in
    :class:`~grip_env.envs.selection.TokenSelectionEnv`: the same seed gives the same sequence of both.

    ## Rewards

    Let R(S) be what the one-shot environment pays for the set S, and S_t the set after step t.

    - ``dense=True``: step t pays R(S_t) - R(S_t-1), where R of the empty set counts as 0. The undiscounted sum is
      R(S_k), exactly as with ``dense=False``: this is potential-based shaping (Ng, Harada and Russell, 1999), which
      leaves the optimal policies as they are. Each token is paid for what it changed, so that a learner need not
      find out which of k tokens earned the one number at the end. The first token's reward also holds the level
      from which the instance starts; it is the same whatever is chosen, so that a critic, which sees the instance,
      learns it. Taking it off would need the model's answer to the empty set, and returns would no longer compare
      with the one-shot environment's. The model is asked at every legal step.
    - ``dense=False``: the last step pays R(S_k), the others nothing. The model is asked at the last step only.

    In an episode that illegal actions end early, S_k stands for the tokens that are in by then, none perhaps.

    Both are less ``invalid_action_penalty`` for an illegal action. Train with a discount of 1 (Stable-Baselines3:
    ``gamma=1.0``): less would pay for gaining early rather than for the final set.

    ## Episode End

    ``terminated`` with the step that brings the k-th token in, or with the ``max_invalid_actions``-th illegal action;
    never ``truncated``. So a policy that does not look at the mask, and may repeat an illegal action for ever, comes to
    an end as well: the model then answers from the tokens that are in, and the rewards add up to R of that set. For
    algorithms without masks, such as DQN, ``max_invalid_actions=1`` ends the episode with the first mistake, and a
    penalty tells which action it was.

    ## Information

    As in :class:`~grip_env.envs.selection.TokenSelectionEnv`, the same keys from ``reset`` and ``step``; in place of
    ``over_budget`` there are ``invalid_actions`` (int, so far) and ``action_mask`` (int8 (N,), 1 = legal). ``scored``
    tells of each step whether the model was asked: where it was not, ``log_likelihood`` is 0.0 and ``correct`` False.

    ## Arguments

    Args:
        vlm: The frozen model, or a name or folder for :func:`grip_env.load_vlm`.
        task: Where instances come from, "scenes", or the path of your data (see :class:`grip_env.FileTask`).
        split: Which split of the task.
        budget: Share of the tokens in (0, 1]: a number; a tuple (low, high), drawn log-uniformly for each
            episode (``{"low": low, "high": high}`` is the same and survives JSON); or a list, drawn uniformly.
        reward: A name, a sum of names such as "agreement - 0.1 * kept_fraction", "package.module:object" to import, or
            an object called as ``reward(scores, full)``: see :mod:`grip_env.rewards.terms`.
        question_aware: Whether the agent sees the question.
        render_mode: ``None``, "rgb_array" (``render`` returns uint8 (height, width, 3), of one size throughout an
            episode) or "human" (window).
        max_tokens: N. By default the number of visual tokens of the split's first example; set it for models
            with dynamic resolution, whose images differ.
        max_question_tokens: Q.
        cache_size: How many encoded examples to keep in memory; the least recently used go first.
        feature_dim: F, the width that features have in observations, through a fixed random projection; D by default.
        obs_dtype: Precision of those features, "float32" or "float16"; see
        :class:`~grip_env.envs.core.features.Features`.
        examples: Evaluate on the first so many examples of the split, or on those of these indices, in a fixed order:
            see Starting State of :class:`~grip_env.TokenSelectionEnv`.
        dense: Whether every token pays, or the last alone.
        invalid_action_penalty: Charged for each action that is ignored.
        max_invalid_actions: An episode ends with this many of them, at least 1; ``None`` stands for N.

    Raises:
        ValueError: If an argument is none of the above; while it runs, for an example with more than
            ``max_tokens`` visual or ``max_question_tokens`` question tokens, an action that is no index of a token,
            and unknown reset options.
        gymnasium.error.ResetNeeded: If ``step`` or ``action_masks`` comes before ``reset``, or ``step`` after the
            episode's end.

    ```python
    import gymnasium
    import grip_env

    env = gymnasium.make("GRIP/SequentialSelection-v0", budget=0.05)
    observation, info = env.reset(seed=0)
    terminated = False
    while not terminated:
        action = env.action_space.sample(mask=info["action_mask"])
        observation, reward, terminated, truncated, info = env.step(action)
        print(action, reward, info["log_likelihood"])
    ```
    """

    rules_class = SequentialRules

    def __init__(
        self,
        vlm: FrozenVLM | str = "tiny",
        task: Task | str = "scenes",
        split: str = "train",
        budget: Budget = 0.1,
        reward: Reward | str = "log_likelihood",
        question_aware: bool = True,
        render_mode: RenderMode | None = None,
        max_tokens: int | None = None,
        max_question_tokens: int = 24,
        cache_size: int = 256,
        feature_dim: int | None = None,
        obs_dtype: ObsDtype = "float32",
        examples: int | Sequence[int] | None = None,
        dense: bool = True,
        invalid_action_penalty: float = 0.0,
        max_invalid_actions: int | None = None,
    ) -> None:
        super().__init__(**own_arguments(locals()))

    def action_masks(self) -> np.ndarray:
        """Return which actions are legal, bool (N,)."""
        if self._episode is None:
            raise gymnasium.error.ResetNeeded("there is no episode; call reset() before action_masks()")
        return legal_actions(self._episode)


class SequentialSelectionVectorEnv(EpisodeVectorEnv, single=SequentialSelectionEnv):
    """``num_envs`` instances of :class:`~grip_env.envs.sequential.SequentialSelectionEnv`, encoded and scored
    together.

    Environment i, seeded with s, goes through the same episodes as a single environment seeded with s + i. A step
    makes one call of the language model at most, whatever it scores, and one of the encoder where episodes begin.
    Episodes end at different steps, and by default each gives way to the next in the same step
    (``AutoresetMode.SAME_STEP``): the observation returned then belongs to the new one,
    ``infos["final_obs"]`` (object (num_envs,) of dicts of
    read-only arrays) and ``infos["final_info"]`` to the one that ended. Each key comes with the ``_key`` mask of
    Gymnasium, bool (num_envs,), which tells whose entries count; masks such as ``kept`` come as bool (num_envs, N).

    Args:
        num_envs: How many instances.
        options: The arguments of the single environment, by the same names and with the same defaults. Ranges and
            lists of budgets are drawn from separately for each instance; of ``examples``, instance i takes every
            ``num_envs``-th; ``render_mode`` is ``None`` or "rgb_array".
        max_episode_steps: An episode is truncated at this step, as by ``gymnasium.wrappers.TimeLimit``, which
            ``gymnasium.make`` puts around the single environment for the same argument.
        autoreset_mode: See :class:`~grip_env.envs.core.vector_env.EpisodeVectorEnv`.

    Raises:
        ValueError: As the single environment, and if ``num_envs`` or ``max_episode_steps`` is below 1.

    ```python
    import gymnasium
    import grip_env

    envs = gymnasium.make_vec("GRIP/SequentialSelection-v0", num_envs=8, budget=(0.05, 0.5))
    observations, infos = envs.reset(seed=0)
    for _ in range(20):
        actions = envs.action_space.sample(mask=tuple(infos["action_mask"]))
        observations, rewards, terminated, truncated, infos = envs.step(actions)
        if terminated.any():
            print(infos["final_info"]["correct"][terminated])
    ```
    """

    def action_masks(self) -> np.ndarray:
        """Return which actions are legal in each instance, bool (num_envs, N)."""
        if not self._episodes:
            raise gymnasium.error.ResetNeeded("there are no episodes; call reset() before action_masks()")
        return np.stack([legal_actions(episode) for episode in self._episodes])
