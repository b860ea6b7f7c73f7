"""Rules of an episode, shared by the single and the vector environments."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from gymnasium import spaces

from grip_env.envs.core.checks import MOST, as_options, check_flag, check_whole, is_real, is_whole
from grip_env.envs.core.features import Features
from grip_env.envs.core.instances import Instance, InstanceStore, read_only
from grip_env.envs.core.sampling import (
    Budget,
    EpisodeStream,
    FixedEpisodes,
    check_budget,
    check_examples,
    tokens_in_budget,
)
from grip_env.rewards.judging import RewardScorer
from grip_env.rewards.parsing import resolve_reward
from grip_env.rewards.terms import Reward
from grip_env.tasks import load_task
from grip_env.tasks.base import Task, check_index
from grip_env.vlms.base import FrozenVLM, Scores

__all__ = [
    "ActionMode",
    "Decision",
    "Episode",
    "EpisodeRules",
    "ObsDtype",
    "Observation",
    "Outcome",
    "best_scores",
    "check_penalty",
    "resolve_vlm",
    "stack_full_scores",
]

ActionMode: TypeAlias = Literal["binary", "scores"]
ObsDtype: TypeAlias = Literal["float32", "float16"]
Observation: TypeAlias = dict[str, np.ndarray]

_OPTIONS = ("budget", "index")


class Outcome(NamedTuple):
    """Result of scoring a selection with the model."""

    log_likelihood: float
    correct: bool
    reward: float
    """Reward of the selection, without penalties."""


@dataclass
class Episode:
    """State of an episode: one instance, one budget, and the decisions so far."""

    instance: Instance
    k: int
    selection: np.ndarray = field(init=False)
    """Kept tokens, bool (N,); none at first."""
    outcome: Outcome | None = None
    """Result of scoring ``selection``; ``None`` if the last step was not scored."""
    value: float = 0.0
    """Reward of the last selection that was scored; 0 before the first."""
    reward: float = 0.0
    """Reward of the last step."""
    violations: int = 0
    """Number of rule violations: tokens over budget, or ignored actions."""
    steps: int = 0
    over: bool = False
    chance: np.random.Generator | None = None
    """Random generator of the episode, if it has its own; see :meth:`EpisodeRules.chance`."""

    def __post_init__(self) -> None:
        self.selection = self.instance.nothing


class Decision(NamedTuple):
    """Consequences of an action; the episode changes only when the decision is carried out."""

    episode: Episode
    selection: np.ndarray
    """Kept tokens after the decision, bool (N,)."""
    violations: int = 0
    scored: bool = True
    """Whether the selection is scored."""
    ends: bool = True
    """Whether the decision ends the episode."""


@dataclass(frozen=True)
class Fixed:
    """Values that the options of a reset fix; the stream provides those that are ``None``."""

    index: int | None = None
    budget: float | None = None


NOTHING_FIXED = Fixed()


class EpisodeRules(ABC):
    """Base class of decision processes, used by single and vector environments.

    A subclass defines the actions. ``penalty`` is charged for each violation of the rules; the other arguments
    are those of :class:`~grip_env.envs.selection.TokenSelectionEnv`.
    """

    action_space: spaces.Space[Any]
    one_step = False
    """Whether every episode has exactly one step."""

    def __init__(
        self,
        *,
        vlm: FrozenVLM | str,
        task: Task | str,
        split: str,
        budget: Budget,
        reward: Reward | str,
        penalty: float,
        question_aware: bool,
        max_tokens: int | None,
        max_question_tokens: int,
        cache_size: int,
        feature_dim: int | None = None,
        obs_dtype: ObsDtype = "float32",
        examples: int | Sequence[int] | None = None,
    ) -> None:
        check_whole("cache_size", cache_size, 0)
        check_whole("max_question_tokens", max_question_tokens, 1, MOST)
        check_whole("max_tokens", 1 if max_tokens is None else max_tokens, 1, MOST)
        check_flag("question_aware", question_aware)
        self.budget = check_budget(budget)
        self.reward = _resolve_reward(reward)
        self.task = _resolve_task(task)
        check_index(self.task, split, 0)
        self.examples = None if examples is None else check_examples(examples, self.task.size(split))
        self.vlm = resolve_vlm(vlm)
        self.split = split
        self.penalty = float(penalty)
        self.question_aware = question_aware
        self.max_question_tokens = max_question_tokens
        words = max_question_tokens if question_aware else None
        self.rewards = RewardScorer(self.vlm, self.reward)
        self.features = Features(self.vlm.width, feature_dim, obs_dtype)
        self.store = InstanceStore(self.rewards, self.task, split, max_tokens, words, cache_size, self.features)
        self.max_tokens = self.store.max_tokens
        self.observation_space = self._observation_space()

    def _observation_space(self) -> spaces.Dict:
        count, words = self.max_tokens, self.max_question_tokens
        fields: dict[str, spaces.Space[Any]] = {
            "tokens": self.features.space(count),
            "token_mask": spaces.MultiBinary(count),
            "positions": spaces.Box(0.0, 1.0, (count, 2), np.float32),
            "budget": spaces.Box(0.0, 1.0, (1,), np.float32),
        }
        if self.question_aware:
            fields["question"] = self.features.space(words)
            fields["question_mask"] = spaces.MultiBinary(words)
        return spaces.Dict(fields)

    # -- episodes ----------------------------------------------------------------------------------------

    def stream(self, generator: np.random.Generator, part: int = 0, parts: int = 1) -> EpisodeStream | FixedEpisodes:
        """Return the stream of episodes seeded by ``generator``, or one part of a fixed list.

        Parts are as long as the numbers of episodes that Stable-Baselines3's ``evaluate_policy`` takes from each of
        ``parts`` environments: the last ones have one more if the list cannot be divided evenly.
        """
        if self.examples is None:
            return EpisodeStream(generator, self.task.size(self.split), self.budget)
        return FixedEpisodes(self.examples[parts - 1 - part :: parts], self.budget)

    def chance(self, episode: Episode, generator: np.random.Generator) -> np.random.Generator:
        """Return the generator for an episode's random choices: its own one if episodes are fixed."""
        if self.examples is None:
            return generator
        if episode.chance is None:
            episode.chance = np.random.default_rng(episode.instance.index)
        return episode.chance

    def check_options(self, options: dict[str, Any] | None) -> Fixed:
        """Return the values that the options of a reset fix.

        Nothing is drawn, so an error leaves the state unchanged.

        Raises:
            ValueError: If an option is unknown, or its type or value is invalid.
            IndexError: If the split has no such index.
        """
        options = as_options(options, _OPTIONS)
        index, budget = options.get("index"), options.get("budget")
        if budget is not None:
            if not is_real(budget):
                raise ValueError(f"the reset option 'budget' is a share of the tokens, one number; got {budget!r}")
            budget = float(budget)
            check_budget(budget)
        if index is not None:
            if not is_whole(index):
                raise ValueError(f"the reset option 'index' is a whole number; got {index!r}")
            index = int(index)
            check_index(self.task, self.split, index)
        return Fixed(index, budget)

    @staticmethod
    def request(stream: EpisodeStream | FixedEpisodes, fixed: Fixed = NOTHING_FIXED) -> tuple[int, float]:
        """Draw the next (index, budget); fixed values are not drawn."""
        return stream.next(fixed.index, fixed.budget)

    def advance(self, decisions: Sequence[Decision] = (), requests: Sequence[tuple[int, float]] = ()) -> list[Episode]:
        """Carry out decisions and begin episodes, with few calls of the model.

        There is at most one call of the encoder and one of the language model; two of the latter if the reward needs
        agreement, as the scores to compare with must be known first.

        Args:
            decisions: Decisions to carry out, at most one for each episode.
            requests: (index, budget) of each episode that begins.

        Returns:
            The new episodes, in the order of ``requests``.
        """
        instances = self.store.load(index for index, _ in requests)
        unscored = [instance for instance in instances.values() if instance.full is None]
        asked = [decision for decision in decisions if decision.scored]
        jobs = [(decision.episode.instance, decision.selection) for decision in asked]
        whole = [(instance, instance.real) for instance in unscored]
        full = stack_full_scores(decision.episode for decision in asked)
        scores: Scores | None = None
        wholes: Scores | None = None
        if full is not None and full.first_token is not None:
            scores = self.store.score(jobs, full)
            wholes = self.store.score(whole) if whole else None
        elif jobs + whole:
            both = self.store.score(jobs + whole)
            scores, wholes = both[: len(jobs)], both[len(jobs) :]
        # rewards first: if one raises, every episode is unchanged
        outcomes = iter(
            []
            if scores is None or full is None
            else self._judge(scores, full, [decision.episode for decision in asked])
        )
        for row, instance in enumerate(unscored):
            assert wholes is not None
            # a copy: an instance kept in memory must not keep the scores of all the others alive
            instance.full = wholes[torch.tensor([row])]
        for decision in decisions:
            self._carry_out(decision, next(outcomes) if decision.scored else None)
        return [
            Episode(instances[index], tokens_in_budget(budget, instances[index].count)) for index, budget in requests
        ]

    def _judge(self, scores: Scores, full: Scores, episodes: Sequence[Episode]) -> list[Outcome]:
        """Return the outcome of each row of the scores (R, 1), those of R episodes."""
        examples = [episode.instance.example for episode in episodes]
        columns = (scores.log_likelihood, scores.correct, self.rewards.judge(scores, full, examples=examples))
        return [Outcome(*row) for row in zip(*(column[:, 0].tolist() for column in columns), strict=True)]

    def _carry_out(self, decision: Decision, outcome: Outcome | None) -> None:
        episode = decision.episode
        value = episode.value if outcome is None else outcome.reward
        episode.reward = value - episode.value - self.penalty * decision.violations
        episode.value, episode.outcome = value, outcome
        episode.selection = decision.selection
        episode.violations += decision.violations
        episode.steps += 1
        episode.over = decision.ends

    # -- observations and actions ------------------------------------------------------------------------

    def shared_view(self, episode: Episode) -> Observation:
        """Return an observation that shares memory with others; copy it before handing it out."""
        return episode.instance.observed | {"budget": np.array([episode.k / episode.instance.count], dtype=np.float32)}

    def observe(self, episode: Episode) -> Observation:
        """Return a fresh observation of an episode."""
        return {key: value.copy() for key, value in self.shared_view(episode).items()}

    def read_only_view(self, episode: Episode) -> Observation:
        """Return a read-only observation that shares memory with others."""
        return {key: read_only(value) for key, value in self.shared_view(episode).items()}

    def info(self, episode: Episode) -> dict[str, Any]:
        """Return the info of a reset or a step.

        Its keys, and the shapes and types of their values, are the same at every step of every episode, so that
        trainers can stack and store them; there are no strings, which few trainers can store. Values that are not
        known (yet) are 0, False or empty masks, with a flag that says so.
        """
        instance, outcome = episode.instance, episode.outcome
        relevant = instance.relevant
        return {
            "index": instance.index,
            "k": episode.k,
            "kept": episode.selection.copy(),
            "kept_count": int(np.count_nonzero(episode.selection)),
            "relevant": instance.nothing.copy() if relevant is None else relevant.copy(),
            "relevant_count": 0 if relevant is None else int(np.count_nonzero(relevant)),
            "relevance_known": relevant is not None,
            "full_log_likelihood": instance.full_log_likelihood,
            "scored": outcome is not None,
            "log_likelihood": 0.0 if outcome is None else outcome.log_likelihood,
            "correct": False if outcome is None else outcome.correct,
        }

    @abstractmethod
    def check_action(self, action: Any, shape: tuple[int, ...]) -> np.ndarray:
        """Return ``action`` as an array of ``shape``, that of the single or batched action space.

        Raises:
            ValueError: If it is not a valid action.
        """

    @abstractmethod
    def decide(self, episode: Episode, action: Any, generator: np.random.Generator) -> Decision:
        """Turn the checked action of one environment into a decision; the episode stays as it is."""


def best_scores(scores: np.ndarray, k: int, generator: np.random.Generator) -> np.ndarray:
    """Return the indices of the k highest of ``scores`` (N,), long (min(k, N),) in any order.

    Ties at the k-th place are broken by ``generator``, since breaking them by index would favour tokens at the top of
    the image; without such ties, nothing is drawn.

    >>> best_scores(np.array([0.5, 2.0, 1.0]), 2, np.random.default_rng(0)).tolist()
    [1, 2]
    """
    if k >= len(scores):
        return np.arange(len(scores))
    cut = np.partition(scores, len(scores) - k)[len(scores) - k]  # the k-th highest
    above, level = np.flatnonzero(scores > cut), np.flatnonzero(scores == cut)
    room = k - len(above)
    if len(level) > room:
        level = generator.choice(level, room, replace=False)
    return np.concatenate([above, level])


def check_penalty(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is a finite, non-negative number."""
    if not is_real(value) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number, at least 0; got {value!r}")


def stack_full_scores(episodes: Iterable[Episode]) -> Scores | None:
    """Return the full-image scores of R episodes, fields (R, 1); ``None`` if there are none."""
    rows = [episode.instance.full for episode in episodes]
    known = [scores for scores in rows if scores is not None]
    assert len(known) == len(rows)
    return Scores.concatenate(known) if known else None


def resolve_vlm(vlm: FrozenVLM | str) -> FrozenVLM:
    """Return a model, given itself, its name or its folder; raise ValueError otherwise."""
    if isinstance(vlm, str | PathLike):
        from grip_env.vlms import load_vlm

        return load_vlm(vlm)
    if isinstance(vlm, type) or not all(hasattr(vlm, name) for name in ("width", "encode", "score")):
        raise ValueError(
            f"vlm must be the name or folder of a model, or an object that implements FrozenVLM; got {vlm!r}: put "
            "HuggingFaceVLM(model, processor) around a model of transformers"
        )
    return vlm


def _resolve_task(task: Task | str) -> Task:
    found = load_task(task)
    if isinstance(found, type) or not isinstance(found, Task):
        raise ValueError(
            f"task must be 'scenes', the path of your data, or an object that implements Task; got {task!r}"
        )
    return found


def _resolve_reward(reward: Reward | str) -> Reward:
    try:
        return resolve_reward(reward)
    except TypeError as error:
        raise ValueError(str(error)) from None
