"""One decision per episode: which visual tokens the language model gets to see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces

from grip_env.envs.core.checks import as_numbers
from grip_env.envs.core.rules import (
    ActionMode,
    Decision,
    Episode,
    EpisodeRules,
    ObsDtype,
    best_scores,
    check_penalty,
)
from grip_env.envs.core.sampling import Budget
from grip_env.envs.core.single_env import EpisodeEnv, RenderMode, own_arguments
from grip_env.envs.core.vector_env import EpisodeVectorEnv
from grip_env.rewards.terms import Reward
from grip_env.tasks.base import Task
from grip_env.vlms.base import FrozenVLM

__all__ = ["SelectionRules", "TokenSelectionEnv", "TokenSelectionVectorEnv"]


_MEANING = {"binary": "0 or 1", "scores": "score"}


class SelectionRules(EpisodeRules):
    """A single decision: the whole set at once.

    The arguments are those of :class:`~grip_env.envs.selection.TokenSelectionEnv`.
    """

    one_step = True

    def __init__(self, *, action_mode: ActionMode, over_budget_penalty: float, **common: Any) -> None:
        if action_mode not in ("binary", "scores"):
            raise ValueError(f"action_mode must be 'binary' or 'scores'; got {action_mode!r}")
        check_penalty("over_budget_penalty", over_budget_penalty)
        super().__init__(penalty=over_budget_penalty, **common)
        self.action_mode = action_mode
        self.action_space = (
            spaces.MultiBinary(self.max_tokens)
            if action_mode == "binary"
            else spaces.Box(-1.0, 1.0, (self.max_tokens,), np.float32)
        )

    def check_action(self, action: Any, shape: tuple[int, ...]) -> np.ndarray:
        """Return ``action`` as an array of ``shape``.

        Raises:
            ValueError: If the shape is another, a binary action is not made of 0 and 1, or a score is NaN.
        """
        each = f"one {_MEANING[self.action_mode]} for each of the {self.max_tokens} visual tokens"
        given = as_numbers(action, "biuf", f"numbers, {each}")
        if given.shape != shape:
            raise ValueError(f"the action has shape {given.shape}, expected {shape}: {each}")
        if self.action_mode == "scores":
            bad = int(np.isnan(given).sum())
            if bad:
                raise ValueError(
                    f"the action has NaN for {bad} of its {given.size} scores, expected numbers: check the "
                    "policy that gave them"
                )
            with np.errstate(over="ignore"):  # of longer floats: what is too large becomes infinite
                return given.astype(np.float64)
        strange = given[(given != 0) & (given != 1)]
        if strange.size:
            raise ValueError(
                f"a binary action holds 0 (drop) and 1 (keep), but this one has {strange[0]}: for real-valued "
                "scores use action_mode='scores'"
            )
        return given.astype(bool)

    def decide(self, episode: Episode, action: np.ndarray, generator: np.random.Generator) -> Decision:
        """Turn a checked action (N,) into a selection within the budget; the episode stays as it is.

        Only an action over budget, or one that leaves open which tokens are the best, draws from ``generator``.
        """
        real = episode.instance.real
        if self.action_mode == "binary":
            selection = action & real
            excess = max(0, int(np.count_nonzero(selection)) - episode.k)
            if excess:
                chosen = generator.choice(np.flatnonzero(selection), episode.k, replace=False)
                selection[:] = False
                selection[chosen] = True
            return Decision(episode, selection, excess)
        selection = np.zeros(self.max_tokens, dtype=bool)
        candidates = episode.instance.candidates
        selection[candidates[best_scores(action[candidates], episode.k, generator)]] = True
        return Decision(episode, selection, 0)

    def info(self, episode: Episode) -> dict[str, Any]:
        """Return the info of a reset or a step."""
        return super().info(episode) | {"over_budget": episode.violations}


class TokenSelectionEnv(EpisodeEnv[np.ndarray]):
    """Choose which visual tokens a frozen vision-language model may see before it answers a question.

    ## Description

    Each episode is one question about one image. The model's encoder has turned the image into N visual
    tokens of width D; a budget allows k of them into the language model. The agent chooses the set in a
    single decision and is paid by how well the model then answers. The model never changes.

    B instances, N visual tokens, D width, Q question tokens, k kept.

    ## Action Space

    - ``action_mode="binary"``: ``MultiBinary(N)``, int8 (N,), 1 = keep. If more than k are chosen, k of them
      are kept uniformly at random (from the environment's own generator) and ``info["over_budget"]`` tells
      by how many. Fewer are allowed; with none kept the model answers from the question alone.
    - ``action_mode="scores"``: ``Box(-1, 1, (N,), float32)``, the k highest scores are kept; which of equal scores
      is drawn at random (from the environment's own generator). The bounds are there for policies that want a
      normalised space: any number but NaN is accepted. ``GRIP/TokenScores-v0`` is this mode under an id of its own.

    Padding tokens are never kept, whatever the action.

    For learning, prefer scores. A binary policy that has learnt nothing keeps about half of the tokens and has them cut
    to k at random, so that its action says little about what was kept: charge ``over_budget_penalty``, or start it near
    the budget. Scores that are *clipped* to the space lose their order where they leave it: of 144 drawn from N(0, 1),
    23 become 1, and with k = 14 chance alone then decides. So begin with a small standard deviation
    (Stable-Baselines3's PPO and A2C: ``policy_kwargs={"log_std_init": -2.0}``), squash with tanh rather than clip (SAC
    does), or send the scores as they are, beyond the bounds. TD3 and DDPG are likely to end with most scores at the
    bounds: prefer SAC or PPO.

    ## Observation Space

    A ``Dict`` of fresh arrays:

    | key | space | dtype, shape | meaning |
    |---|---|---|---|
    | tokens | Box, any finite number | float32 (N, D) | visual tokens as the language model gets them |
    | token_mask | MultiBinary | int8 (N,) | 1 where a row of ``tokens`` is real |
    | positions | Box [0, 1] | float32 (N, 2) | row and column of each token's centre in the image |
    | question | Box, any finite number | float32 (Q, D) | the language model's embeddings of the question |
    | question_mask | MultiBinary | int8 (Q,) | 1 where a row of ``question`` is real |
    | budget | Box [0, 1] | float32 (1,) | k divided by the number of real tokens |

    Padding is zero. ``question_aware=False`` leaves out ``question`` and ``question_mask``.

    Of wide models, observations are large. LLaVA-1.5 has 576 tokens of width 4096; with 24 words that is 600 x 4096 x 4
    bytes = 9.8 MB, and a rollout buffer of 2,048 of them takes 20 GB. ``feature_dim=256`` projects tokens and words to
    F = 256 numbers each, by one fixed random matrix, and ``obs_dtype="float16"`` halves what is left: 600 x 256 x 2
    bytes = 0.31 MB, and 0.63 GB for the buffer (Stable-Baselines3 keeps observations in the precision of their space;
    its policies and Gymnasium's spaces know float16). The model itself still gets its own features.

    ## Starting State

    The next instance of a shuffle of the split, under the next budget; k = max(1, round(budget * real
    tokens)). Both depend on the seed alone, never on the actions. Every instance comes once before any comes
    again; each pass has a new order. ``reset(options={"index": 3, "budget": 0.05})`` fixes either or both for
    one episode; a fixed index leaves the shuffle where it is.

    **The same test twice.** ``examples=200`` takes the first 200 examples of the split, and ``examples=[3, 1, 4]``
    those of these indices, in this order and then from the first again. The budget of each, where it is drawn, and what
    chance decides in its episode depend on its index alone, on no seed. ``reset()`` goes on after an episode and begins
    anew where no step was taken since the last reset; ``reset(seed=...)`` begins anew. So each call of
    Stable-Baselines3's ``evaluate_policy(model, env, n_eval_episodes=200)``, or of ``EvalCallback``, sees each of the
    200 once, in one order, and equal policies have equal means. The vector environments share the examples out; of
    several single environments, give environment i of n ``examples=range(n - 1 - i, 200, n)``.

    ## Rewards

    ``reward(scores, full)`` minus ``over_budget_penalty`` for each token over budget. By default the mean
    log-likelihood of the answer's tokens minus the same with every token kept: 0 means that nothing was lost.

    ## Episode End

    After one step: always ``terminated``, never ``truncated``. The last observation shows the same instance
    again.

    ## Information

    ``reset`` and ``step`` give the same keys, of the same types and shapes in every episode, so that trainers can stack
    and store them; none is the name of an observation.

    | key | type | meaning |
    |---|---|---|
    | index | int | which instance of the split |
    | k | int | how many tokens may be kept |
    | kept | bool (N,) | the tokens kept so far; none after ``reset`` |
    | kept_count | int | how many |
    | relevant | bool (N,) | tokens that decide the answer; none where the task does not know |
    | relevant_count | int | how many |
    | relevance_known | bool | whether the task knows |
    | full_log_likelihood | float | of the answer with every token kept, nats per answer token |
    | scored | bool | whether the model answered in this step, False after ``reset`` |
    | log_likelihood | float | of the answer with the tokens kept; 0.0 unless ``scored`` |
    | correct | bool | would greedy decoding give the answer? False unless ``scored`` |
    | over_budget | int | by how many tokens the action was over budget; 0 after ``reset`` |

    Masks index arrays as they are, ``observation["tokens"][info["kept"]]``; for a list of indices take
    ``np.flatnonzero(info["kept"])``. Texts are no part of infos, as few trainers can store them:
    ``env.unwrapped.example`` has the question, the answer and the picture of the instance that ``index`` names.

    ## Arguments

    Args:
        vlm: The frozen model, or a name or folder for :func:`grip_env.load_vlm`.
        task: Where instances come from, "scenes", or the path of your data (see :class:`grip_env.FileTask`).
        split: Which split of the task.
        budget: Share of the tokens in (0, 1]: a number; a tuple (low, high), drawn log-uniformly for each
            episode (``{"low": low, "high": high}`` is the same and survives JSON); or a list, drawn uniformly.
        action_mode: "binary" or "scores".
        reward: "log_likelihood", "probability", "exact_match", "agreement" or "kept_fraction"; a sum of these such
            as "log_likelihood - 0.1 * kept_fraction"; "package.module:object" to import; or an object called as
            ``reward(scores, full)``. See :mod:`grip_env.rewards.terms`. With "agreement" in it, each example in memory
            takes another float32 for each word of the vocabulary.
        over_budget_penalty: Charged for each token by which a binary action is over budget.
        question_aware: Whether the agent sees the question.
        render_mode: ``None``, "rgb_array" (``render`` returns uint8 (height, width, 3)) or "human" (window).
        max_tokens: N. By default the number of visual tokens of the split's first example; set it for models
            with dynamic resolution, whose images differ.
        max_question_tokens: Q.
        cache_size: How many encoded examples to keep in memory; the least recently used go first.
        feature_dim: F, the width that features have in observations, through a fixed random projection; D by default.
        obs_dtype: Precision of those features, "float32" or "float16"; see
        :class:`~grip_env.envs.core.features.Features`.
        examples: Evaluate on the first so many examples of the split, or on those of these indices, in a fixed order:
            see Starting State.

    Raises:
        ValueError: If an argument is none of the above; while it runs, for an example with more than
            ``max_tokens`` visual or ``max_question_tokens`` question tokens, an action of the wrong shape or
            with NaN in it, and unknown reset options.
        gymnasium.error.ResetNeeded: If ``step`` comes before ``reset`` or after the episode's end.

    ```python
    import gymnasium
    import numpy as np

    import grip_env

    env = gymnasium.make("GRIP/TokenSelection-v0", budget=0.1, action_mode="scores")
    observation, info = env.reset(seed=0)
    action = env.action_space.sample()
    observation, reward, terminated, truncated, info = env.step(action)
    print(np.flatnonzero(info["kept"]), reward, info["correct"])
    ```
    """

    rules_class: ClassVar[Callable[..., SelectionRules]] = SelectionRules

    def __init__(
        self,
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
    ) -> None:
        super().__init__(**own_arguments(locals()))


class TokenSelectionVectorEnv(EpisodeVectorEnv, single=TokenSelectionEnv):
    """``num_envs`` instances of :class:`~grip_env.envs.selection.TokenSelectionEnv`, encoded and scored
    together.

    Environment i, seeded with s, goes through the same episodes as a single environment seeded with s + i.
    Every step ends all episodes and, by default, begins the next ones (``AutoresetMode.SAME_STEP``): the observations
    returned then belong to the new episodes, ``infos["final_obs"]`` (object (num_envs,) of dicts of read-only arrays)
    and ``infos["final_info"]`` to those that ended, with the ``_key`` masks of Gymnasium. Masks such as
    ``kept`` come as bool (num_envs, N).

    Args:
        num_envs: How many instances.
        options: The arguments of the single environment, by the same names and with the same defaults. Ranges and
            lists of budgets are drawn from separately for each instance; of ``examples``, instance i takes every
            ``num_envs``-th; ``render_mode`` is ``None`` or "rgb_array". Actions have shape (num_envs, N).
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
