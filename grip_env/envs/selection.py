"""One decision per episode: which visual tokens the language model gets to see."""

from __future__ import annotations

from typing import Any, Literal, cast

import gymnasium
import numpy as np

from grip_env.envs.episodes import ActionMode, Episode, Observation, SelectionRules
from grip_env.envs.rendering import draw_selection
from grip_env.envs.rewards import Reward
from grip_env.envs.sampling import Budget, EpisodeStream
from grip_env.tasks.base import Task
from grip_env.vlms.base import FrozenVLM

__all__ = ["RenderMode", "TokenSelectionEnv", "draw_episode"]

RenderMode = Literal["rgb_array", "human"]


class TokenSelectionEnv(gymnasium.Env[Observation, np.ndarray]):
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
    - ``action_mode="scores"``: ``Box(-1, 1, (N,), float32)``, the k highest scores are kept; of equal scores,
      those of lower index. The bounds are there for policies that want a normalised space: any number but
      NaN is accepted.

    Padding tokens are never kept, whatever the action.

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

    ## Starting State

    The next instance of a shuffle of the split, under the next budget; k = max(1, round(budget * real
    tokens)). Both depend on the seed alone, never on the actions. Every instance comes once before any comes
    again; each pass has a new order. ``reset(options={"index": 3, "budget": 0.05})`` fixes either or both for
    one episode; a fixed index leaves the shuffle where it is.

    ## Rewards

    ``reward(scores, full)`` minus ``over_budget_penalty`` for each token over budget. By default the mean
    log-likelihood of the answer's tokens minus the same with every token kept: 0 means that nothing was lost.

    ## Episode End

    After one step: always ``terminated``, never ``truncated``. The last observation shows the same instance
    again.

    ## Information

    Both ``reset`` and ``step``: ``k`` (int), ``full_log_likelihood`` (float, nats per answer token, every
    token kept) and, where the task knows it, ``relevant`` (list of int: tokens that decide the answer, best
    first). ``reset`` alone: ``index`` (int), ``split``, ``question`` and ``family`` (str). ``step`` alone:
    ``log_likelihood`` (float), ``correct`` (bool: would greedy decoding give the answer?), ``kept`` (list of
    int, ascending) and ``over_budget`` (int). What is not known is absent. The lists index arrays as they
    are: ``observation["tokens"][info["kept"]]``.

    ## Arguments

    Args:
        vlm: The frozen model, or a name or folder for :func:`grip_env.load_vlm`.
        task: Where instances come from, "scenes", or the path of your data (see :class:`grip_env.FileTask`).
        split: Which split of the task.
        budget: Share of the tokens in (0, 1]: a number; a tuple (low, high), drawn log-uniformly for each
            episode; or a list, drawn uniformly.
        action_mode: "binary" or "scores".
        reward: "log_likelihood", "probability" or "exact_match", or an object called as
            ``reward(scores, full)``.
        over_budget_penalty: Charged for each token by which a binary action is over budget.
        question_aware: Whether the agent sees the question.
        render_mode: ``None``, "rgb_array" (``render`` returns uint8 (height, width, 3)) or "human" (window).
        max_tokens: N. By default the number of visual tokens of the split's first example; set it for models
            with dynamic resolution, whose images differ.
        max_question_tokens: Q.
        cache_size: How many encoded examples to keep in memory; the least recently used go first.

    Raises:
        ValueError: If an argument is none of the above; while it runs, for an example with more than
            ``max_tokens`` visual or ``max_question_tokens`` question tokens, an action of the wrong shape or
            with NaN in it, and unknown reset options.
        gymnasium.error.ResetNeeded: If ``step`` comes before ``reset`` or after the episode's end.

    ```python
    import gymnasium
    import grip_env

    env = gymnasium.make("GRIP/TokenSelection-v0", budget=0.1, action_mode="scores")
    observation, info = env.reset(seed=0)
    action = env.action_space.sample()
    observation, reward, terminated, truncated, info = env.step(action)
    print(info["kept"], reward, info["correct"])
    ```
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 (declared so by Gymnasium)
        "render_modes": ["human", "rgb_array"],
        "render_fps": 2,
    }

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
    ) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode must be None, 'rgb_array' or 'human'; got {render_mode!r}")
        self.rules = self._make_rules(
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
        )
        self.render_mode = render_mode
        self.observation_space = cast(gymnasium.Space[Observation], self.rules.observation_space)
        self.action_space = self.rules.action_space
        self._stream: EpisodeStream | None = None
        self._episode: Episode | None = None
        self._window: Any = None

    def _make_rules(self, **arguments: Any) -> SelectionRules:
        """Return the decision process; environments with one of their own override this."""
        return SelectionRules(**arguments)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin the next episode.

        Args:
            seed: Starts the sequence of episodes over; the same seed gives the same sequence.
            options: "index" and "budget" fix this episode's instance and share of the tokens.
        """
        fixed = self.rules.check_options(options)
        super().reset(seed=seed)
        if seed is not None or self._stream is None:
            self._stream = self.rules.stream(self.np_random)
        self._episode = None
        (self._episode,) = self.rules.advance(requests=[self.rules.request(self._stream, fixed)])
        if self.render_mode == "human":
            self.render()
        return self.rules.observe(self._episode), self.rules.start_info(self._episode)

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Keep the chosen tokens, let the model answer, and end the episode.

        Args:
            action: (N,), see Action Space.
        """
        episode = self._episode
        if episode is None or episode.outcome is not None:
            state = "not begun" if episode is None else "ended: each has a single step"
            raise gymnasium.error.ResetNeeded(f"the episode has {state}; call reset() before step()")
        checked = self.rules.check_action(action, (self.rules.max_tokens,))
        self.rules.advance([self.rules.decide(episode, checked, self.np_random)])
        assert episode.outcome is not None
        if self.render_mode == "human":
            self.render()
        return self.rules.observe(episode), episode.outcome.reward, True, False, self.rules.end_info(episode)

    def render(self) -> np.ndarray | None:
        """Draw the image and the question; after the step also what was kept and what came of it."""
        if self._episode is None:
            raise gymnasium.error.ResetNeeded("there is no episode to draw; call reset() before render()")
        if self.render_mode is None:
            gymnasium.logger.warn("render() draws nothing without a render_mode: pass render_mode='rgb_array'")
            return None
        picture = draw_episode(self._episode)
        if self.render_mode == "rgb_array":
            return picture
        self._show(picture)
        return None

    def _show(self, picture: np.ndarray) -> None:
        from matplotlib import pyplot

        if self._window is None or not pyplot.fignum_exists(self._window.number):
            height, width = picture.shape[:2]
            self._window = pyplot.figure("GRIP token selection", figsize=(width / 100, height / 100), dpi=100)
        self._window.clear()
        axes = self._window.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.imshow(picture)
        canvas = self._window.canvas
        canvas.draw()
        if canvas.required_interactive_framework is not None:  # a backend that draws to memory has no window to raise
            self._window.show()
            canvas.flush_events()

    def close(self) -> None:
        """Close the window, if there is one."""
        if self._window is not None:
            from matplotlib import pyplot

            pyplot.close(self._window)
            self._window = None


def draw_episode(episode: Episode) -> np.ndarray:
    """Return the picture of an episode, uint8 (height, width, 3); a dot marks cells known to matter."""
    instance, outcome = episode.instance, episode.outcome
    real = instance.real
    example = instance.example
    assert instance.full is not None
    full = float(instance.full.log_likelihood.exp())
    if outcome is None:
        lines = [example.question, f"{episode.k} of {real.sum()} tokens may be kept"]
        return draw_selection(example.image, instance.positions[real], lines=lines)
    verdict = "answered correctly" if outcome.correct else "answered wrongly"
    lines = [
        example.question,
        f'answer "{example.answer}": p = {np.exp(outcome.log_likelihood):.2f}, with all tokens {full:.2f}',
        f"{outcome.selection.sum()} of {real.sum()} tokens kept (budget {episode.k}), {verdict}",
    ]
    relevant = instance.relevant()
    marked = None if relevant is None else np.isin(np.arange(len(real)), relevant)[real]
    return draw_selection(example.image, instance.positions[real], outcome.selection[real], lines, marked)
