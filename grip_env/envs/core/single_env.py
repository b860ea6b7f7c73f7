"""Base class of the single environments: episode steps and rendering."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, cast

import gymnasium
import numpy as np
from gymnasium.core import ActType

from grip_env.envs.core.autoreset import warn_where_steps_are_idle
from grip_env.envs.core.checks import as_seed
from grip_env.envs.core.rendering import draw_selection
from grip_env.envs.core.rules import Episode, EpisodeRules, Observation
from grip_env.envs.core.sampling import EpisodeStream, FixedEpisodes
from grip_env.envs.core.window import Window
from grip_env.tasks.base import Example

__all__ = ["EpisodeEnv", "RenderMode", "as_arrays", "draw_episode", "own_arguments"]

RenderMode = Literal["rgb_array", "human"]


def own_arguments(scope: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a constructor, given its ``locals()``.

    Call it before the constructor assigns any other variable.

    >>> class Environment:
    ...     def __init__(self, budget=0.1, split="train"):
    ...         self.arguments = own_arguments(locals())
    >>> Environment(0.2).arguments
    {'budget': 0.2, 'split': 'train'}
    """
    return {name: value for name, value in scope.items() if name not in ("self", "__class__")}


def as_arrays(info: dict[str, Any]) -> dict[str, Any]:
    """Return an info whose numbers have a NumPy dtype, which TorchRL asks for.

    Truth values become arrays without axes: Gymnasium's vector environments would collect ``np.bool_`` as objects.
    """
    kinds: dict[type, Callable[[Any], Any]] = {bool: np.array, int: np.int64, float: np.float64}
    return {key: kinds[type(value)](value) if type(value) in kinds else value for key, value in info.items()}


class EpisodeEnv(gymnasium.Env[Observation, ActType]):
    """Base class of the single environments.

    A subclass sets ``rules_class``, which defines the decision process.

    Args:
        render_mode: ``None``, "rgb_array" or "human".
        arguments: Arguments of the rules.

    Raises:
        ValueError: If the render mode is unknown.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 (declared so by Gymnasium)
        "render_modes": ["human", "rgb_array"],
        "render_fps": 2,
    }

    rules_class: ClassVar[Callable[..., EpisodeRules]]

    def __init__(self, render_mode: RenderMode | None, **arguments: Any) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode must be None, 'rgb_array' or 'human'; got {render_mode!r}")
        self.rules = type(self).rules_class(**arguments)
        self.render_mode = render_mode
        self.observation_space = cast(gymnasium.Space[Observation], self.rules.observation_space)
        self.action_space = self.rules.action_space
        self._stream: EpisodeStream | FixedEpisodes | None = None
        self._episode: Episode | None = None
        self._window = Window("GRIP visual tokens")
        self._knows_its_caller = False

    @property
    def example(self) -> Example:
        """Example of the current episode: image, question, answer and kind of question.

        Raises:
            gymnasium.error.ResetNeeded: Before the first reset.
        """
        if self._episode is None:
            raise gymnasium.error.ResetNeeded("there is no episode; call reset() before asking for its example")
        return self._episode.instance.example

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin the next episode.

        Args:
            seed: Starts the sequence of episodes over; the same seed gives the same sequence. (With ``examples``, a
                reset of an episode without any step also starts it over.)
            options: "index" and "budget" fix this episode's instance and share of the tokens.

        Raises:
            ValueError: If the seed is not a whole number, at least 0, or an option is invalid; the state of the
                environment is then unchanged.
            IndexError: If there is no such index.
        """
        fixed, seed = self.rules.check_options(options), as_seed(seed)
        super().reset(seed=seed)
        # a trainer's evaluation does not seed: it resets the unused episode that began after its last one
        anew = self.rules.examples is not None and self._episode is not None and not self._episode.steps
        if seed is not None or self._stream is None or anew:
            self._stream = self.rules.stream(self.np_random)
        if not self._knows_its_caller and self._episode is not None and self._episode.steps == 1:
            self._knows_its_caller = True
            warn_where_steps_are_idle(self, every=self.rules.one_step)
        self._episode = None
        (self._episode,) = self.rules.advance(requests=[self.rules.request(self._stream, fixed)])
        if self.render_mode == "human":
            self.render()
        return self.rules.observe(self._episode), as_arrays(self.rules.info(self._episode))

    def step(self, action: ActType) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Keep the tokens that the action chooses and return the outcome, as in Gymnasium.

        The model answers only in steps whose reward needs it.

        Args:
            action: See Action Space.
        """
        episode = self._episode
        if episode is None or episode.over:
            state = "not begun" if episode is None else f"ended at step {episode.steps}"
            raise gymnasium.error.ResetNeeded(f"the episode has {state}; call reset() before step()")
        checked = self.rules.check_action(action, self.action_space.shape or ())
        self.rules.advance([self.rules.decide(episode, checked, self.rules.chance(episode, self.np_random))])
        if self.render_mode == "human":
            self.render()
        info = as_arrays(self.rules.info(episode))
        return self.rules.observe(episode), episode.reward, episode.over, False, info

    def render(self) -> np.ndarray | None:
        """Draw the image and the question; after a step, also the kept tokens and the outcome."""
        if self._episode is None:
            raise gymnasium.error.ResetNeeded("there is no episode to draw; call reset() before render()")
        if self.render_mode is None:
            gymnasium.logger.warn("render() draws nothing without a render_mode: pass render_mode='rgb_array'")
            return None
        picture = self.draw(self.rules, self._episode)
        if self.render_mode == "rgb_array":
            return picture
        self._window.show(picture)
        return None

    @staticmethod
    def draw(rules: EpisodeRules, episode: Episode) -> np.ndarray:
        """Return the picture of an episode, uint8 (height, width, 3); see :func:`draw_episode`."""
        return draw_episode(episode)

    def close(self) -> None:
        """Close the window, if there is one."""
        self._window.close()


def draw_episode(episode: Episode) -> np.ndarray:
    """Draw the image and the question of an episode; after a step, also the kept tokens.

    The model's answer is shown once it is known. After a step, a dot marks the cells that decide the answer. All frames
    have the same size.

    Returns:
        uint8 (height, width, 3).
    """
    instance, outcome = episode.instance, episode.outcome
    example, real = instance.example, instance.real
    assert instance.full is not None
    full, reached = float(instance.full.log_likelihood.exp()), None
    count, answer = f"{episode.k} of {real.sum()} tokens may be kept", ""
    if episode.steps:
        count = f"{episode.selection.sum()} of {real.sum()} tokens kept (budget {episode.k})"
    if outcome is not None:
        count += ", answered correctly" if outcome.correct else ", answered wrongly"
        reached = float(np.exp(outcome.log_likelihood))
        answer = f'p = {reached:.2f} (all tokens: {full:.2f}) for the answer "{example.answer}"'
    selection = marked = None
    if episode.steps:
        selection, relevant = episode.selection[real], instance.relevant
        marked = None if relevant is None else relevant[real]
    return draw_selection(
        example.image,
        instance.positions[real],
        selection,
        [example.question],
        marked,
        status=[count, answer],
        cells=None if instance.cells is None else instance.cells[real],
        likelihood=(reached, full),
    )
