"""Environments that drop visual tokens in stages, between the language model's layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grip_env.envs.core.rendering import Panel, captioned, draw_selection, gallery
from grip_env.envs.core.rules import ActionMode, Episode, EpisodeRules, ObsDtype
from grip_env.envs.core.sampling import Budget
from grip_env.envs.core.single_env import EpisodeEnv, RenderMode, own_arguments
from grip_env.envs.core.vector_env import EpisodeVectorEnv
from grip_env.envs.progressive_rules import StagedEpisode, StageRules
from grip_env.rewards.terms import Reward
from grip_env.tasks.base import Task
from grip_env.vlms.base import FrozenVLM

__all__ = ["ProgressivePruningEnv", "ProgressivePruningVectorEnv", "draw_stages"]

_ACROSS = 4  # pictures side by side
_PANEL = 288  # pixels along a side of each


class ProgressivePruningEnv(EpisodeEnv[np.ndarray]):
    """Environment in which each action drops visual tokens before a layer of a frozen model.

    ## Description

    Each episode is one question about one image, whose visual tokens enter the language model. Before each of T of its
    layers, the stages, the agent sees the hidden states of the tokens that survive so far and decides which to keep.
    A dropped token is absent from all later layers, so early mistakes are costly; keeping a token has a cost as
    well, as every layer it is in counts against the budget. The model never changes. FastV (arXiv
    2403.06764, one stage) and PyramidDrop (arXiv 2410.17247, several) are policies of this kind.

    Dimensions: N visual tokens, n of them real, D width, Q question tokens, T stages, k tokens allowed after a stage.

    ## Action Space

    - ``action_mode="binary"``: ``MultiBinary(N)``, int8 (N,), 1 = keep. If more than k surviving tokens are chosen, k
      of them are kept uniformly at random (from the environment's own generator) and ``info["over_budget"]`` is the
      number of tokens in excess. Fewer are allowed, even none.
    - ``action_mode="scores"``: ``Box(-1, 1, (N,), float32)``. With ``stage_budgets``, the k surviving tokens of highest
      score are kept. With ``budget``, these are kept only if their score is above 0, so that the agent decides how much
      to spend now and how much to leave for later. Ties are broken at random (by the environment's own generator). Any
      number but NaN is accepted.

    Padding and dropped tokens are never kept, whatever the action.

    ## Observation Space

    A ``Dict`` of fresh arrays; rows of tokens that are dropped or padding are zero:

    | key | space | dtype, shape | meaning |
    |---|---|---|---|
    | tokens | Box, any finite number | float32 (N, D) | hidden states of the tokens as they enter the stage's layer |
    | token_mask | MultiBinary | int8 (N,) | 1 for tokens that survive so far |
    | positions | Box [0, 1] | float32 (N, 2) | row and column of each token's centre in the image |
    | question | Box, any finite number | float32 (Q, D) | the language model's embeddings of the question |
    | question_mask | MultiBinary | int8 (Q,) | 1 where a row of ``question`` is real |
    | budget | Box [0, 1] | float32 (1,) | k divided by the number of surviving tokens; 0 if there are none |
    | remaining | Box [0, 1] | float32 (1,) | share of the budget left for the stage's layer and later ones |
    | stage | MultiBinary | int8 (T,) | one-hot: the stage to decide; all 0 at the end |
    | attention | Box [0, 1] | float32 (N,) | only with ``attention=True``; see below |

    At layer 0, ``tokens`` are the visual tokens themselves. ``feature_dim`` and ``obs_dtype`` make ``tokens`` and
    ``question`` smaller, as in :class:`~grip_env.TokenSelectionEnv`. ``remaining`` counts slots, one for each token in
    each layer: the number that may still be taken, divided by the number that all n tokens would take, at most 1.
    ``attention`` is the attention of the prompt's last token to each surviving token in the stage's layer, averaged
    over heads. Models are causal: hidden states do not depend on the answer, nor on the question if the image comes
    before it, as in LLaVA; attention depends on the question. ``question_aware=False`` leaves out ``question`` and
    ``question_mask``.

    ## Starting State

    As in :class:`~grip_env.TokenSelectionEnv`: the next instance of a shuffle of the split, with the next budget; both
    depend on the seed alone. ``reset(options={"index": 3, "budget": 0.2})`` fixes either or both for one episode.

    ## Budgets

    - ``stage_budgets=(b_1, ..., b_T)``: k = max(1, round(b_t * n)) tokens may survive stage t.
    - ``budget``: at most max(1, round(budget * n)) visual tokens may be present on average over all layers, including
      those before the first stage: as many as a single decision before the first layer may keep at this budget. At
      each stage, k is the largest number that, present until the next stage, leaves a slot for at least one token in
      each later layer. If a stage spends everything, one token is left from the next stage on.

    In both cases, k never exceeds the number of surviving tokens.

    ## Rewards

    0 until the last stage is decided, then ``reward(scores, full)`` of the model's answer: by default the mean
    log-likelihood of the answer's tokens minus the same with nothing dropped. ``over_budget_penalty`` is charged for
    each token over budget, in the step of that action.

    ## Episode End

    After T steps: ``terminated``, never ``truncated``. The last observation shows the surviving tokens as they entered
    the layer of the last stage; ``stage``, ``budget`` and ``remaining`` are 0.

    ## Information

    The same keys from ``reset`` and ``step``: those of :class:`~grip_env.TokenSelectionEnv`, where ``kept`` are the
    tokens that survive so far (all after ``reset``), ``scored`` is True in the last step only, ``k`` and
    ``over_budget`` belong to the stage just decided or, after ``reset``, to the first; and

    | key | type | meaning |
    |---|---|---|
    | stage_index, layer | int | that stage, counted from 0, and the layer it comes before |
    | layer_average_budget | float | upper bound of ``layer_average_tokens`` |
    | layer_average_tokens | float | mean over all layers of the visual tokens present; 0.0 before the last step |
    | flops_saved | float | saved share of the unpruned model's FLOPs over the prompt; 0.0 before the last step |

    The agent's own FLOPs are not counted.

    ## Arguments

    Args:
        vlm: The frozen model, or a name or folder for :func:`grip_env.load_vlm`. It must allow its layers to be run one
            by one; see :func:`grip_env.vlms.decoder.staged_forward.decoder_of`.
        task: Source of the instances: a task, "scenes", "scenes-hard", or the path of your data (see
            :class:`grip_env.FileTask`).
        split: Name of the split.
        stages: Decoder layers before which tokens can be dropped, strictly increasing, from 0.
        budget: Share of the tokens, mean over all layers, in (0, 1]: a number; a tuple (low, high), drawn log-uniformly
            for each episode (``{"low": low, "high": high}`` is the same and survives JSON); or a list, drawn
            uniformly. 0.1 if neither this nor ``stage_budgets`` is given.
        stage_budgets: Alternative to ``budget``: a share for each stage, not increasing.
        action_mode: "binary" or "scores".
        reward: A name, a sum of names such as "agreement - 0.1 * kept_fraction", "package.module:object" to import, or
            an object called as ``reward(scores, full)``: see :mod:`grip_env.rewards.terms`.
        over_budget_penalty: Penalty for each token by which a binary action is over budget.
        question_aware: Whether the agent sees the question.
        attention: Whether the agent sees ``attention``.
        render_mode: ``None``, "rgb_array" (``render`` returns uint8 (height, width, 3), of one size throughout an
            episode) or "human" (window).
        max_tokens: N. By default the number of visual tokens of the split's first example.
        max_question_tokens: Q.
        cache_size: Number of encoded examples to keep in memory; the least recently used are dropped first.
        feature_dim: F, the width of features in observations, including hidden states, after a fixed random projection;
            D by default.
        obs_dtype: Precision of these features, "float32" or "float16"; see
            :class:`~grip_env.envs.core.features.Features`.
        examples: Number of first examples of the split, or list of indices, to evaluate on in a fixed order; see
            Starting State of :class:`~grip_env.TokenSelectionEnv`. Ask ``evaluate_policy`` for as many
            episodes as there are examples.

    Raises:
        NotImplementedError: If the layers of the model cannot be run one by one.
        ValueError: If an argument is invalid, or the stages make the budget impossible; in ``reset`` and ``step``, also
            for an example with more than ``max_tokens`` visual or ``max_question_tokens`` question tokens, an action
            of the wrong shape or with NaN, and unknown reset options.
        gymnasium.error.ResetNeeded: If ``step`` comes before ``reset`` or after the episode's end.

    ```python
    import gymnasium
    import grip_env

    env = gymnasium.make("GRIP/ProgressivePruning-v0", stages=(0, 2), budget=0.2, action_mode="scores")
    observation, info = env.reset(seed=0)
    terminated = False
    while not terminated:
        action = env.action_space.sample()
        observation, reward, terminated, truncated, info = env.step(action)
        print(info["layer"], info["kept_count"], "of", info["k"])
    print(reward, info["correct"], info["layer_average_tokens"], info["flops_saved"])
    ```
    """

    rules: StageRules
    rules_class = StageRules

    def __init__(
        self,
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
    ) -> None:
        super().__init__(**own_arguments(locals()))

    @staticmethod
    def draw(rules: EpisodeRules, episode: Episode) -> np.ndarray:
        """Return the picture of an episode, uint8 (height, width, 3); see :func:`draw_stages`."""
        assert isinstance(rules, StageRules)
        return draw_stages(rules, episode)


def draw_stages(rules: StageRules, episode: Episode) -> np.ndarray:
    """Draw the image of an episode and one picture for each stage, uint8 (height, width, 3).

    Stages that are not decided yet are dim; at the end, a dot marks the cells that decide the answer, if known. All
    pictures of an environment have the same size.
    """
    assert isinstance(episode, StagedEpisode)
    instance = episode.instance
    assert instance.full is not None
    example, real = instance.example, instance.real
    cells = None if instance.cells is None else instance.cells[real]
    centres, marked, caption = instance.positions[real], None, f"{instance.count} tokens"
    full, reached, status = float(instance.full.log_likelihood.exp()), None, ["", ""]
    if episode.outcome is not None:
        end = rules.savings(episode)
        reached = float(np.exp(episode.outcome.log_likelihood))
        verdict = "correctly" if episode.outcome.correct else "wrongly"
        status = [
            f"{end['layer_average_tokens']:.1f} tokens a layer, {end['flops_saved']:.0%} of the FLOPs saved, answered "
            f"{verdict}",
            f'p = {reached:.2f} (all tokens: {full:.2f}) for the answer "{example.answer}"',
        ]
        marked = None if instance.relevant is None else instance.relevant[real]
    plain = draw_selection(example.image, centres, size=_PANEL, cells=cells, square=True)
    panels: list[Panel | np.ndarray | None] = [Panel(plain, caption)]
    for stage, layer in enumerate(rules.schedule.stages):
        survivors, caption = np.zeros_like(real), f"layer {layer}"
        if stage < len(episode.stages):
            survivors = episode.stages[stage].selection
            caption = f"layer {layer}: {survivors.sum()} kept of at most {episode.stages[stage].k}"
        elif stage == len(episode.stages):
            caption = f"layer {layer}: at most {rules.allowance(episode)}"
        shown = survivors[real]
        picture = draw_selection(example.image, centres, shown, (), marked, _PANEL, cells, square=True)
        panels.append(Panel(picture, caption))
    rows = [panels[start : start + _ACROSS] for start in range(0, len(panels), _ACROSS)]
    return captioned(gallery(rows, size=_PANEL), [example.question], status, likelihood=(reached, full))


class ProgressivePruningVectorEnv(EpisodeVectorEnv, single=ProgressivePruningEnv):
    """Vector environment of pruning in stages, whose instances run in lock-step.

    It runs ``num_envs`` instances of :class:`~grip_env.envs.progressive.ProgressivePruningEnv`. Environment i, seeded
    with s, goes through the same episodes as a single environment seeded with s + i (hidden states and rewards up to
    float rounding, as batches are summed in another order). Seeds and options are handled as in
    :class:`~grip_env.envs.selection.TokenSelectionVectorEnv`. Every episode has as many steps as there are stages, so
    episodes that begin together end together; by default the last step also begins the next ones
    (``AutoresetMode.SAME_STEP``): the observations returned then belong to the new episodes, ``infos["final_obs"]``
    (object (num_envs,) of dicts of read-only arrays) and ``infos["final_info"]`` to those that ended, with the ``_key``
    masks of Gymnasium. Masks such as ``kept`` have shape (num_envs, N).

    Args:
        num_envs: Number of instances.
        options: The arguments of the single environment, with the same names and defaults. Budgets from ranges and
            lists are drawn separately for each instance; of ``examples``, each instance takes every ``num_envs``-th;
            ``render_mode`` is ``None`` or "rgb_array". Actions have shape (num_envs, N).
        max_episode_steps: As for ``gymnasium.make``; below the number of stages, no episode reaches its answer.
        autoreset_mode: See :class:`~grip_env.envs.core.vector_env.EpisodeVectorEnv`.

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
