"""Environments that select one visual token per step, until the budget is used."""

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
    """Return the mask of real tokens that are not selected yet, bool (N,)."""
    return episode.instance.real & ~episode.selection


class SequentialRules(EpisodeRules):
    """Rules of selecting one token per step.

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
            ValueError: If the shape or type is wrong, or there is no token of that index.
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
        """Add a token to the selection, unless the action is illegal, as a decision.

        The episode does not change.
        """
        selection = episode.selection.copy()
        if not legal_actions(episode)[action]:
            # the selection is scored at the end: otherwise doing nothing would pay 0, as if nothing were lost
            ends = episode.violations + 1 >= self.max_invalid_actions
            return Decision(episode, selection, violations=1, scored=ends, ends=ends)
        selection[action] = True
        ends = bool(selection.sum() == episode.k)
        return Decision(episode, selection, scored=self.dense or ends, ends=ends)

    def shared_view(self, episode: Episode) -> Observation:
        """Return an observation that shares memory with others."""
        return super().shared_view(episode) | {"selected": episode.selection.astype(np.int8)}

    def info(self, episode: Episode) -> dict[str, Any]:
        """Return the info of a reset or a step."""
        mask = legal_actions(episode).astype(np.int8)
        return super().info(episode) | {"invalid_actions": episode.violations, "action_mask": mask}


class SequentialSelectionEnv(EpisodeEnv[np.int64]):
    """Environment in which each action adds one visual token to those a frozen model may see.

    ## Description

    The decision of :class:`~grip_env.envs.selection.TokenSelectionEnv`, split into steps: each step adds one visual
    token to the set, until it has the k tokens that the budget allows. The final set has the same reward as there.

    Dimensions: N visual tokens, D width, Q question tokens, k kept tokens.

    ## Action Space

    ``Discrete(N)``: the index of the token to add. ``action_masks()`` returns the mask of legal actions, bool (N,): the
    real tokens that are not selected yet. sb3-contrib's MaskablePPO calls it (through wrappers:
    ``env.get_wrapper_attr("action_masks")()``); ``info["action_mask"]`` is the same as int8, as in Gymnasium's own
    environments, for ``env.action_space.sample(mask=info["action_mask"])``. An illegal action is ignored, increases
    ``info["invalid_actions"]`` by 1 and costs ``invalid_action_penalty``; the ``max_invalid_actions``-th ends the
    episode.

    ## Observation Space

    A ``Dict`` of fresh arrays: those of :class:`~grip_env.envs.selection.TokenSelectionEnv` (``tokens``,
    ``token_mask``, ``positions``, ``question``, ``question_mask`` and ``budget``, which is k divided by the number of
    real tokens throughout) and

    | key | space | dtype, shape | meaning |
    |---|---|---|---|
    | selected | MultiBinary | int8 (N,) | 1 for the tokens selected so far |

    ## Starting State

    No token is selected. Instances and budgets are drawn as in :class:`~grip_env.envs.selection.TokenSelectionEnv`: the
    same seed gives the same sequence of both.

    ## Rewards

    Let R(S) be the one-shot environment's reward for the set S, and S_t the set after step t.

    - ``dense=True``: step t pays R(S_t) - R(S_t-1), where R of the empty set counts as 0. The undiscounted sum is
      R(S_k), exactly as with ``dense=False``: this is potential-based shaping (Ng, Harada and Russell, 1999), which
      leaves the optimal policies unchanged. Each token is credited with the change it made, so the learner need not
      find out which of the k tokens earned a single final reward. The first token's reward also includes the
      instance's baseline, which is the same for every choice, so a critic, which sees the instance, can learn it.
      Subtracting it would require the model's answer to the empty set, and returns would no longer be comparable with
      the one-shot environment's. The model is run at every legal step.
    - ``dense=False``: the last step pays R(S_k), the others pay 0. The model is run at the last step only.

    If illegal actions end an episode early, S_k stands for the tokens selected by then, possibly none.

    In both cases, ``invalid_action_penalty`` is subtracted for an illegal action. Train with a discount of 1
    (Stable-Baselines3: ``gamma=1.0``): a smaller one would reward early gains rather than the final set.

    ## Episode End

    ``terminated`` with the step that adds the k-th token, or with the ``max_invalid_actions``-th illegal action;
    never ``truncated``. So episodes end even if a policy ignores the mask and repeats an illegal action forever: the
    model then answers from the tokens selected so far, and the rewards add up to R of that set. For algorithms without
    masks, such as DQN, ``max_invalid_actions=1`` ends the episode at the first illegal action, and a penalty teaches
    the policy to avoid it.

    ## Information

    As in :class:`~grip_env.envs.selection.TokenSelectionEnv`, the same keys from ``reset`` and ``step``; in place of
    ``over_budget`` there are ``invalid_actions`` (int, so far) and ``action_mask`` (int8 (N,), 1 = legal). ``scored``
    says whether the model was run in this step: if not, ``log_likelihood`` is 0.0 and ``correct`` False.

    ## Arguments

    Args:
        vlm: The frozen model, or a name or folder for :func:`grip_env.load_vlm`.
        task: Source of the instances: a task, "scenes", "scenes-hard", or the path of your data (see
            :class:`grip_env.FileTask`).
        split: Name of the split.
        budget: Share of the tokens in (0, 1]: a number; a tuple (low, high), drawn log-uniformly for each
            episode (``{"low": low, "high": high}`` is the same and survives JSON); or a list, drawn uniformly.
        reward: A name, a sum of names such as "agreement - 0.1 * kept_fraction", "package.module:object" to import, or
            an object called as ``reward(scores, full)``: see :mod:`grip_env.rewards.terms`.
        question_aware: Whether the agent sees the question.
        render_mode: ``None``, "rgb_array" (``render`` returns uint8 (height, width, 3), of one size throughout an
            episode) or "human" (window).
        max_tokens: N. By default the number of visual tokens of the split's first example; set it for models
            with dynamic resolution, whose images have different numbers of tokens.
        max_question_tokens: Q.
        cache_size: Number of encoded examples to keep in memory; the least recently used are dropped first.
        feature_dim: F, the width of features in observations, after a fixed random projection; D by default.
        obs_dtype: Precision of these features, "float32" or "float16"; see
            :class:`~grip_env.envs.core.features.Features`.
        examples: Number of first examples of the split, or list of indices, to evaluate on in a fixed order; see
            Starting State of :class:`~grip_env.TokenSelectionEnv`. Ask ``evaluate_policy`` for as many
            episodes as there are examples.
        dense: Whether every token has a reward, or only the last.
        invalid_action_penalty: Penalty for each illegal action.
        max_invalid_actions: Number of illegal actions that ends an episode, at least 1; ``None`` stands for N.

    Raises:
        ValueError: If an argument is invalid; in ``reset`` and ``step``, for an example with more than
            ``max_tokens`` visual or ``max_question_tokens`` question tokens, an action that is not a token's index, and
            unknown reset options.
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
        """Return the mask of legal actions, bool (N,)."""
        if self._episode is None:
            raise gymnasium.error.ResetNeeded("there is no episode; call reset() before action_masks()")
        return legal_actions(self._episode)


class SequentialSelectionVectorEnv(EpisodeVectorEnv, single=SequentialSelectionEnv):
    """Vector environment of token-by-token selection, encoding and scoring all together.

    It runs ``num_envs`` instances of :class:`~grip_env.envs.sequential.SequentialSelectionEnv`. Environment i, seeded
    with s, goes through the same episodes as a single environment seeded with s + i. A step makes at most one call of
    the language model, two if the reward needs agreement, and one of the encoder if episodes begin. Episodes end at
    different steps, and by default the next one begins in the same step
    (``AutoresetMode.SAME_STEP``): the observation returned then belongs to the new
    episode, ``infos["final_obs"]`` (object (num_envs,) of dicts of read-only arrays) and ``infos["final_info"]`` to the
    one that ended. Each key comes with the ``_key`` mask of Gymnasium, bool (num_envs,), which marks the valid entries;
    masks such as ``kept`` have shape (num_envs, N).

    Args:
        num_envs: Number of instances.
        options: The arguments of the single environment, with the same names and defaults. Budgets from ranges and
            lists are drawn separately for each instance; of ``examples``, each instance takes every ``num_envs``-th;
            ``render_mode`` is ``None`` or "rgb_array".
        max_episode_steps: An episode is truncated at this step, as by ``gymnasium.wrappers.TimeLimit``, in which
            ``gymnasium.make`` wraps the single environment for the same argument.
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
        """Return the mask of legal actions in each instance, bool (num_envs, N)."""
        if not self._episodes:
            raise gymnasium.error.ResetNeeded("there are no episodes; call reset() before action_masks()")
        return np.stack([legal_actions(episode) for episode in self._episodes])
