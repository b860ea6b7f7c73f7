"""Environments with one decision per episode: the set of visual tokens to keep."""

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
    """Rules of a single decision, which selects the whole set.

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
            ValueError: If the shape is wrong, a binary action contains anything but 0 and 1, or a score is NaN.
        """
        each = f"one {_MEANING[self.action_mode]} for each of the {self.max_tokens} visual tokens"
        given = as_numbers(action, "biuf", f"numbers, {each}")
        if given.shape != shape:
            raise ValueError(f"the action has shape {given.shape}, expected {shape}: {each}")
        if self.action_mode == "scores":
            bad = int(np.isnan(given).sum())
            if bad:
                raise ValueError(
                    f"the action has NaN for {bad} of its {given.size} scores, expected numbers: check the policy"
                )
            with np.errstate(over="ignore"):  # longer floats that are too large become infinite
                return given.astype(np.float64)
        strange = given[(given != 0) & (given != 1)]
        if strange.size:
            raise ValueError(
                f"a binary action holds 0 (drop) and 1 (keep), but this one has {strange[0]}: for real-valued "
                "scores use action_mode='scores'"
            )
        return given.astype(bool)

    def decide(self, episode: Episode, action: np.ndarray, generator: np.random.Generator) -> Decision:
        """Turn a checked action (N,) into a selection within the budget, as a decision.

        The episode does not change. Only a binary action over budget, or tied scores, draw from ``generator``.
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
    """Environment in which one action selects the visual tokens that a frozen model may see.

    ## Description

    Each episode is one question about one image. The encoder of a vision-language model has turned the image into N
    visual tokens of width D; a budget allows k of them into the language model. The agent chooses the set in a
    single decision, and its reward says how well the model then answers the question. The model never changes.

    Dimensions: B instances, N visual tokens, D width, Q question tokens, k kept tokens.

    ## Action Space

    - ``action_mode="binary"``: ``MultiBinary(N)``, int8 (N,), 1 = keep. If more than k are chosen, k of them
      are kept uniformly at random (from the environment's own generator) and ``info["over_budget"]`` is the number
      of tokens in excess. Fewer are allowed; with none kept, the model answers from the question alone.
    - ``action_mode="scores"``: ``Box(-1, 1, (N,), float32)``. The k tokens with the highest scores are kept; ties are
      broken at random (by the environment's own generator). The bounds are there for policies that need a
      normalised space; any number but NaN is accepted. ``GRIP/TokenScores-v0`` is this mode under its own id.

    Padding tokens are never kept, whatever the action.

    For learning, prefer scores. An untrained binary policy chooses about half of the tokens, which are then cut to k at
    random, so that its action says little about the tokens kept: set ``over_budget_penalty``, or initialise the policy
    near the budget. Scores that are *clipped* to the space lose their order beyond the bounds: of 144 drawn from
    N(0, 1), 23 become 1, and with k = 14 chance alone then decides. So start with a small standard deviation
    (Stable-Baselines3's PPO and A2C: ``policy_kwargs={"log_std_init": -2.0}``), squash with tanh instead of clipping
    (as SAC does), or pass scores beyond the bounds unclipped. TD3 and DDPG are likely to end with most scores at the
    bounds: prefer SAC or PPO.

    ## Observation Space

    A ``Dict`` of fresh arrays:

    | key | space | dtype, shape | meaning |
    |---|---|---|---|
    | tokens | Box, any finite number | float32 (N, D) | visual tokens as passed to the language model |
    | token_mask | MultiBinary | int8 (N,) | 1 where a row of ``tokens`` is real |
    | positions | Box [0, 1] | float32 (N, 2) | row and column of each token's centre in the image |
    | question | Box, any finite number | float32 (Q, D) | the language model's embeddings of the question |
    | question_mask | MultiBinary | int8 (Q,) | 1 where a row of ``question`` is real |
    | budget | Box [0, 1] | float32 (1,) | k divided by the number of real tokens |

    Padding is zero. ``question_aware=False`` leaves out ``question`` and ``question_mask``.

    Observations of wide models are large. LLaVA-1.5 has 576 tokens of width 4096; with 24 words that is 600 x 4096 x 4
    bytes = 9.8 MB, and a rollout buffer of 2,048 of them takes 20 GB. ``feature_dim=256`` projects tokens and words to
    F = 256 numbers each, by one fixed random matrix, and ``obs_dtype="float16"`` halves the rest: 600 x 256 x 2
    bytes = 0.31 MB, and 0.63 GB for the buffer (Stable-Baselines3 stores observations in the precision of their space;
    its policies and Gymnasium's spaces support float16). The model itself still gets its own features.

    ## Starting State

    The next instance of a shuffle of the split, with the next budget; k = max(1, round(budget * real
    tokens)). Both depend on the seed alone, never on the actions. Every instance comes once before any is
    repeated; each pass has a new order. ``reset(options={"index": 3, "budget": 0.05})`` fixes either or both for
    one episode; a fixed index does not advance the shuffle.

    **Reproducible evaluation.** ``examples=200`` takes the first 200 examples of the split, and ``examples=[3, 1, 4]``
    the examples with these indices, in this order, repeatedly. If budgets are drawn, the budget of an example, like all
    random choices in its episode, depends on its index alone, not on a seed. After an episode, ``reset()`` continues
    with the next example; if no step was taken since the last reset, or with ``reset(seed=...)``, it starts over. So
    each call of Stable-Baselines3's ``evaluate_policy(model, env, n_eval_episodes=200)``, or of ``EvalCallback``, uses
    each of the 200 examples once, in the same order, and equal policies have equal means. Ask for as many episodes as
    there are examples (or a multiple, if they divide evenly over the environments): fewer may leave environments
    of a ``DummyVecEnv`` in the middle of an episode of several steps, and the next evaluation then sees other examples.
    A vector environment distributes the examples over its instances; with n single environments, pass
    ``examples=range(n - 1 - i, 200, n)`` to environment i.

    ## Rewards

    ``reward(scores, full)`` minus ``over_budget_penalty`` for each token over budget. By default, the mean
    log-likelihood of the answer's tokens minus the same with every visual token kept: 0 means that nothing was lost.

    ## Episode End

    After one step: always ``terminated``, never ``truncated``. The last observation shows the same instance.

    ## Information

    ``reset`` and ``step`` return the same keys, with the same types and shapes in every episode, so that trainers can
    stack and store them; no key is also a key of the observation.

    | key | type | meaning |
    |---|---|---|
    | index | int | index of the instance in the split |
    | k | int | number of tokens that may be kept |
    | kept | bool (N,) | the tokens kept so far; none after ``reset`` |
    | kept_count | int | number of tokens kept |
    | relevant | bool (N,) | tokens that decide the answer; none if unknown |
    | relevant_count | int | number of these |
    | relevance_known | bool | whether the task knows the relevant tokens |
    | full_log_likelihood | float | log-likelihood of the answer with every token kept, nats per answer token |
    | scored | bool | whether the model answered in this step, False after ``reset`` |
    | log_likelihood | float | log-likelihood of the answer with the kept tokens; 0.0 unless ``scored`` |
    | correct | bool | whether greedy decoding gives the answer; False unless ``scored`` |
    | over_budget | int | number of tokens by which the action was over budget; 0 after ``reset`` |

    Numbers are NumPy scalars (``np.int64``, ``np.float64``) and a single bool is an array of shape (), so that each
    value has a dtype; ``value.tolist()`` is the same in Python's types, e.g. for JSON. Masks can index arrays directly,
    as in ``observation["tokens"][info["kept"]]``; for indices, use ``np.flatnonzero(info["kept"])``. Infos contain no
    strings, as few trainers can store them: ``env.unwrapped.example`` has the question, the answer and the image of the
    current instance.

    ## Arguments

    Args:
        vlm: The frozen model, or a name or folder for :func:`grip_env.load_vlm`.
        task: Source of the instances: a task, "scenes", "scenes-hard", or the path of your data (see
            :class:`grip_env.FileTask`).
        split: Name of the split.
        budget: Share of the tokens in (0, 1]: a number; a tuple (low, high), drawn log-uniformly for each
            episode (``{"low": low, "high": high}`` is the same and survives JSON); or a list, drawn uniformly.
        action_mode: "binary" or "scores".
        reward: "log_likelihood", "probability", "exact_match", "agreement" or "kept_fraction"; a sum of these such
            as "log_likelihood - 0.1 * kept_fraction"; "package.module:object" to import; or an object called as
            ``reward(scores, full)``. See :mod:`grip_env.rewards.terms`. If it uses "agreement", each example in memory
            takes another float32 for each entry of the vocabulary.
        over_budget_penalty: Penalty for each token by which a binary action is over budget.
        question_aware: Whether the agent sees the question.
        render_mode: ``None``, "rgb_array" (``render`` returns uint8 (height, width, 3)) or "human" (window).
        max_tokens: N. By default the number of visual tokens of the split's first example; set it for models
            with dynamic resolution, whose images have different numbers of tokens.
        max_question_tokens: Q.
        cache_size: Number of encoded examples to keep in memory; the least recently used are dropped first.
        feature_dim: F, the width of features in observations, after a fixed random projection; D by default.
        obs_dtype: Precision of these features, "float32" or "float16"; see
            :class:`~grip_env.envs.core.features.Features`.
        examples: Number of first examples of the split, or list of indices, to evaluate on in a fixed order; see
            Starting State. Ask ``evaluate_policy`` for as many episodes as there are examples.

    Raises:
        ValueError: If an argument is invalid; in ``reset`` and ``step``, for an example with more than
            ``max_tokens`` visual or ``max_question_tokens`` question tokens, an action of the wrong shape or
            with NaN, and unknown reset options.
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
    """Vector environment of token selection, whose instances are encoded and scored together.

    It runs ``num_envs`` instances of :class:`~grip_env.envs.selection.TokenSelectionEnv`. Environment i, seeded with s,
    goes through the same episodes as a single environment seeded with s + i.
    Every step ends all episodes and, by default, begins the next ones (``AutoresetMode.SAME_STEP``): the observations
    returned then belong to the new episodes, ``infos["final_obs"]`` (object (num_envs,) of dicts of read-only arrays)
    and ``infos["final_info"]`` to those that ended, with the ``_key`` masks of Gymnasium. Masks such as
    ``kept`` come as bool (num_envs, N).

    Args:
        num_envs: Number of instances.
        options: The arguments of the single environment, with the same names and defaults. Budgets from ranges and
            lists are drawn separately for each instance; of ``examples``, each instance takes every ``num_envs``-th;
            ``render_mode`` is ``None`` or "rgb_array". Actions have shape (num_envs, N).
        max_episode_steps: As for ``gymnasium.make``. Every episode has one step: with 1, all are truncated as well as
            terminated; larger values change nothing.
        autoreset_mode: ``AutoresetMode.SAME_STEP``, ``NEXT_STEP`` or ``DISABLED``, or its name; see
            :class:`EpisodeVectorEnv`. With NEXT_STEP, every second step ignores its action and pays 0, which makes a
            mean over steps look too good.

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
