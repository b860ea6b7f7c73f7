"""The rules of an episode, shared by the single and the vector environment: observe, select, score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from gymnasium import spaces

from grip_env.envs.instances import Instance, InstanceStore, fit, to_array
from grip_env.envs.rewards import Reward, needs_agreement, resolve_reward
from grip_env.envs.sampling import Budget, EpisodeStream, check_budget, tokens_in_budget
from grip_env.tasks import load_task
from grip_env.tasks.base import Task, check_index
from grip_env.vlms.base import FrozenVLM, Scores

__all__ = ["ActionMode", "Decision", "Episode", "Observation", "Outcome", "SelectionRules"]

ActionMode: TypeAlias = Literal["binary", "scores"]
Observation: TypeAlias = dict[str, np.ndarray]

_LARGEST = np.finfo(np.float32).max  # any finite number; infinite bounds make Gymnasium's checker complain
_OPTIONS = ("budget", "index")
_MEANING = {"binary": "0 or 1", "scores": "score"}


@dataclass(frozen=True)
class Outcome:
    """What became of a decision."""

    selection: np.ndarray
    """bool (N,), the tokens that were kept."""
    over_budget: int
    log_likelihood: float
    correct: bool
    reward: float


@dataclass
class Episode:
    """One instance under one budget, and what was decided."""

    instance: Instance
    k: int
    outcome: Outcome | None = None


class Decision(NamedTuple):
    """The selection made in an episode, and by how many tokens the action was over budget."""

    episode: Episode
    selection: np.ndarray
    over_budget: int


@dataclass(frozen=True)
class Fixed:
    """What the options of a reset fix of an episode; ``None`` is left to the stream."""

    index: int | None = None
    budget: float | None = None


NOTHING_FIXED = Fixed()


class SelectionRules:
    """The decision process without its clock: everything but whose turn it is.

    The arguments are those of :class:`~grip_env.envs.selection.TokenSelectionEnv`.
    """

    def __init__(
        self,
        *,
        vlm: FrozenVLM | str,
        task: Task | str,
        split: str,
        budget: Budget,
        action_mode: ActionMode,
        reward: Reward | str,
        over_budget_penalty: float,
        question_aware: bool,
        max_tokens: int | None,
        max_question_tokens: int,
        cache_size: int,
    ) -> None:
        if action_mode not in ("binary", "scores"):
            raise ValueError(f"action_mode must be 'binary' or 'scores'; got {action_mode!r}")
        for name, value, least in (
            ("cache_size", cache_size, 0),
            ("max_question_tokens", max_question_tokens, 1),
            ("max_tokens", 1 if max_tokens is None else max_tokens, 1),
            ("over_budget_penalty", over_budget_penalty, 0),
        ):
            if not value >= least:
                raise ValueError(f"{name} must be at least {least}; got {value}")
        self.budget = check_budget(budget)
        self.reward = resolve_reward(reward)
        self.task = load_task(task)
        check_index(self.task, split, 0)
        self.vlm = _resolve_vlm(vlm)
        self.split = split
        self.action_mode = action_mode
        self.over_budget_penalty = float(over_budget_penalty)
        self.question_aware = question_aware
        self.max_question_tokens = max_question_tokens
        words = max_question_tokens if question_aware else None
        first_token = needs_agreement(self.reward)
        self.store = InstanceStore(self.vlm, self.task, split, max_tokens, words, cache_size, first_token)
        self.max_tokens = self.store.max_tokens
        self.observation_space = self._observation_space()
        self.action_space: spaces.MultiBinary | spaces.Box = (
            spaces.MultiBinary(self.max_tokens)
            if action_mode == "binary"
            else spaces.Box(-1.0, 1.0, (self.max_tokens,), np.float32)
        )

    def _observation_space(self) -> spaces.Dict:
        count, width, words = self.max_tokens, self.vlm.width, self.max_question_tokens
        fields: dict[str, spaces.Space[Any]] = {
            "tokens": spaces.Box(-_LARGEST, _LARGEST, (count, width), np.float32),
            "token_mask": spaces.MultiBinary(count),
            "positions": spaces.Box(0.0, 1.0, (count, 2), np.float32),
            "budget": spaces.Box(0.0, 1.0, (1,), np.float32),
        }
        if self.question_aware:
            fields["question"] = spaces.Box(-_LARGEST, _LARGEST, (words, width), np.float32)
            fields["question_mask"] = spaces.MultiBinary(words)
        return spaces.Dict(fields)

    # -- episodes ----------------------------------------------------------------------------------------

    def stream(self, generator: np.random.Generator) -> EpisodeStream:
        """Return the stream of episodes that ``generator`` stands for."""
        return EpisodeStream(generator, self.task.size(self.split), self.budget)

    def check_options(self, options: dict[str, Any] | None) -> Fixed:
        """Return what the options of a reset fix. Nothing is drawn, so that an error leaves everything as it was.

        Raises:
            ValueError: If an option is unknown or not a valid budget.
            IndexError: If the split has no such index.
        """
        options = options or {}
        unknown = sorted(set(options) - set(_OPTIONS))
        if unknown:
            raise ValueError(f"unknown reset options {unknown}: the options are {', '.join(_OPTIONS)}")
        index, budget = options.get("index"), options.get("budget")
        if budget is not None:
            budget = float(budget)
            check_budget(budget)
        if index is not None:
            index = int(index)
            check_index(self.task, self.split, index)
        return Fixed(index, budget)

    @staticmethod
    def request(stream: EpisodeStream, fixed: Fixed = NOTHING_FIXED) -> tuple[int, float]:
        """Draw the next (index, budget); what is fixed is not drawn."""
        budget = stream.next_budget() if fixed.budget is None else fixed.budget
        return stream.next_index() if fixed.index is None else fixed.index, budget

    def advance(self, decisions: Sequence[Decision] = (), requests: Sequence[tuple[int, float]] = ()) -> list[Episode]:
        """End some episodes and begin others: at most one call of the encoder, one of the language model.

        A reward that needs agreement takes two of the latter: what is compared has to be known before.

        Args:
            decisions: Episodes that end; their outcome is filled in.
            requests: (index, budget) of each episode that begins.

        Returns:
            The new episodes, in the order of ``requests``.
        """
        instances = self.store.load(index for index, _ in requests)
        unscored = [instance for instance in instances.values() if instance.full is None]
        decided = [(decision.episode.instance, decision.selection) for decision in decisions]
        whole = [(instance, instance.real) for instance in unscored]
        calls = (decided, whole) if self.store.first_token else (decided + whole,)
        scores = [score for jobs in calls if jobs for score in self.store.score(jobs)]
        for instance, full in zip(unscored, scores[len(decisions) :], strict=True):
            instance.full = full
        for decision, score in zip(decisions, scores[: len(decisions)], strict=True):
            self._finish(decision, score)
        return [
            Episode(instances[index], tokens_in_budget(budget, int(instances[index].real.sum())))
            for index, budget in requests
        ]

    def _finish(self, decision: Decision, scores: Scores) -> None:
        episode = decision.episode
        assert episode.instance.full is not None
        reward = float(self.reward(scores, episode.instance.full))
        episode.outcome = Outcome(
            selection=decision.selection,
            over_budget=decision.over_budget,
            log_likelihood=float(scores.log_likelihood),
            correct=bool(scores.correct),
            reward=reward - self.over_budget_penalty * decision.over_budget,
        )

    # -- what the agent sees and does --------------------------------------------------------------------

    def observe(self, episode: Episode) -> Observation:
        """Return a fresh observation of an episode."""
        instance = episode.instance
        encoded = instance.encoded
        observation = {
            "tokens": fit(to_array(encoded.tokens[0]), self.max_tokens),
            "token_mask": instance.real.astype(np.int8),
            "positions": instance.positions.copy(),
            "budget": np.array([episode.k / instance.real.sum()], dtype=np.float32),
        }
        if self.question_aware:
            words = self.max_question_tokens
            observation["question"] = fit(to_array(encoded.question[0]), words)
            observation["question_mask"] = fit(encoded.question_mask[0].cpu().numpy(), words).astype(np.int8)
        return observation

    def check_action(self, action: Any, shape: tuple[int, ...]) -> np.ndarray:
        """Return ``action`` as an array of ``shape``.

        Raises:
            ValueError: If the shape is another, a binary action is not made of 0 and 1, or a score is NaN.
        """
        given = np.asarray(action)
        if given.shape != shape:
            raise ValueError(
                f"the action has shape {given.shape}, expected {shape}: one {_MEANING[self.action_mode]} for "
                f"each of the {self.max_tokens} visual tokens"
            )
        if self.action_mode == "scores":
            bad = int(np.isnan(given).sum())
            if bad:
                raise ValueError(
                    f"the action has NaN for {bad} of its {given.size} scores, expected numbers: check the "
                    "policy that gave them"
                )
            return given.astype(np.float64)
        if not np.isin(given, (0, 1)).all():
            strange = given[~np.isin(given, (0, 1))].flat[0]
            raise ValueError(
                f"a binary action holds 0 (drop) and 1 (keep), but this one has {strange}: for real-valued "
                "scores use action_mode='scores'"
            )
        return given.astype(bool)

    def decide(self, episode: Episode, action: np.ndarray, generator: np.random.Generator) -> Decision:
        """Turn a checked action (N,) into a selection within the budget.

        Only an action over budget draws from ``generator``.
        """
        real = episode.instance.real
        selection = np.zeros(self.max_tokens, dtype=bool)
        if self.action_mode == "scores":
            candidates = np.flatnonzero(real)
            best = np.argsort(-action[candidates], kind="stable")[: episode.k]
            selection[candidates[best]] = True
            return Decision(episode, selection, 0)
        chosen = np.flatnonzero(action & real)
        excess = max(0, len(chosen) - episode.k)
        if excess:
            chosen = generator.choice(chosen, episode.k, replace=False)
        selection[chosen] = True
        return Decision(episode, selection, excess)

    def start_info(self, episode: Episode) -> dict[str, Any]:
        """Return the info of a reset."""
        example = episode.instance.example
        return {
            "index": episode.instance.index,
            "split": self.split,
            "question": example.question,
            "family": example.family,
            **self._common_info(episode),
        }

    def end_info(self, episode: Episode) -> dict[str, Any]:
        """Return the info of a step."""
        outcome = episode.outcome
        assert outcome is not None
        # lists, because Gymnasium's vector environments stack arrays, and these differ in length
        return {
            "log_likelihood": outcome.log_likelihood,
            "correct": outcome.correct,
            "kept": [int(token) for token in np.flatnonzero(outcome.selection)],
            "over_budget": outcome.over_budget,
            **self._common_info(episode),
        }

    def _common_info(self, episode: Episode) -> dict[str, Any]:
        full, relevant = episode.instance.full, episode.instance.relevant()
        assert full is not None
        info: dict[str, Any] = {"k": episode.k, "full_log_likelihood": float(full.log_likelihood)}
        return info if relevant is None else info | {"relevant": relevant}


def _resolve_vlm(vlm: FrozenVLM | str) -> FrozenVLM:
    if not isinstance(vlm, str):
        return vlm
    from grip_env.vlms import load_vlm

    return load_vlm(vlm)
