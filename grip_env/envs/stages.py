"""The rules of pruning in stages, shared by the single and the vector environment: observe, decide, go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces

from grip_env.envs.episodes import Episode, Fixed, Observation, SelectionRules
from grip_env.envs.instances import fit, to_array
from grip_env.envs.sampling import tokens_in_budget
from grip_env.envs.schedule import PruningSchedule
from grip_env.flops import flops_saved
from grip_env.vlms.base import Encoded, Scores
from grip_env.vlms.decoders import decoder_of
from grip_env.vlms.staged import StagedForward

__all__ = ["StageDecision", "StageRollout", "StageRules", "StagedEpisode"]


class StageDecision(NamedTuple):
    """What survived a stage."""

    selection: np.ndarray
    """bool (N,)."""
    k: int
    """How many might have."""
    over_budget: int


@dataclass
class StagedEpisode:
    """One instance under one budget, and what was decided at each stage so far."""

    episode: Episode
    decisions: list[StageDecision] = field(default_factory=list)
    ending: dict[str, Any] | None = None
    """What is known once the model has answered."""

    @property
    def count(self) -> int:
        """How many tokens there are before the first stage."""
        return int(self.episode.instance.real.sum())

    @property
    def alive(self) -> np.ndarray:
        """Which tokens survived so far, bool (N,)."""
        return self.decisions[-1].selection if self.decisions else self.episode.instance.real

    @property
    def kept(self) -> list[int]:
        """How many tokens survived each stage so far."""
        return [int(decision.selection.sum()) for decision in self.decisions]


class StageRules:
    """The decision process without its clock.

    Args:
        rules: What it shares with the process of a single decision: instances, actions, rewards.
        stages: Decoder layers before which tokens can be dropped.
        stage_budgets: Share of the tokens that may survive each stage; ``None`` where the budget is for all layers.
        attention: Whether the agent sees how the prompt attends to the tokens.

    Raises:
        NotImplementedError: If the model's layers cannot be run one by one.
        ValueError: If stages or budgets are impossible.
    """

    def __init__(
        self, rules: SelectionRules, stages: Sequence[int], stage_budgets: Sequence[float] | None, attention: bool
    ) -> None:
        self.rules = rules
        self.vlm: Any = rules.vlm
        self.attention = attention
        self.schedule = PruningSchedule(stages, len(decoder_of(self.vlm).layers), stage_budgets)
        lowest = min(rules.budget) if isinstance(rules.budget, tuple | list) else rules.budget
        self._check_share(lowest)
        fields: dict[str, spaces.Space[Any]] = {
            **rules.observation_space.spaces,
            "remaining": spaces.Box(0.0, 1.0, (1,), np.float32),
            "stage": spaces.MultiBinary(len(self.schedule)),
        }
        if attention:
            fields["attention"] = spaces.Box(0.0, 1.0, (rules.max_tokens,), np.float32)
        self.observation_space = spaces.Dict(fields)

    def _check_share(self, share: float) -> None:
        self.schedule.check_total(tokens_in_budget(share, self.rules.max_tokens), self.rules.max_tokens)

    def check_fixed(self, fixed: Fixed) -> Fixed:
        """Return what the options of a reset fix.

        Raises:
            ValueError: If that is a budget which the stages make impossible or say themselves.
        """
        if fixed.budget is not None:
            if self.schedule.shares is not None:
                raise ValueError(
                    f"the reset option 'budget' has no meaning here: stage_budgets={self.schedule.shares} say how many "
                    "tokens may survive"
                )
            self._check_share(fixed.budget)
        return fixed

    def begin(self, requests: Sequence[tuple[int, float]]) -> StageRollout:
        """Begin an episode for each (index, budget): one call of the encoder, one of the language model, then stage 0.

        Raises:
            ValueError: If an instance has more tokens than there is room for, or so few that its budget is impossible.
        """
        episodes = [StagedEpisode(episode) for episode in self.rules.advance(requests=requests)]
        for staged in episodes:
            self.schedule.check_total(staged.episode.k, staged.count)
        return StageRollout(self, episodes)

    def allowance(self, staged: StagedEpisode) -> int:
        """Return how many tokens may survive the next stage."""
        return self.schedule.allowance(staged.count, staged.episode.k, staged.kept)

    def decide(self, staged: StagedEpisode, action: np.ndarray, generator: np.random.Generator) -> StageDecision:
        """Turn a checked action (N,) into a selection of surviving tokens; only an action over budget draws."""
        k, candidates = self.allowance(staged), staged.alive
        if self.rules.action_mode == "scores" and self.schedule.shares is None:
            candidates = candidates & (action > 0)
        # to the rules of a single decision, a stage is an episode whose only real tokens are these
        stage = Episode(replace(staged.episode.instance, real=candidates), k)
        decision = self.rules.decide(stage, action, generator)
        return StageDecision(decision.selection, k, decision.violations)

    def end(self, staged: StagedEpisode, scores: Scores) -> float:
        """Fill in how an episode ended; return its reward.

        Args:
            staged: All stages are decided.
            scores: Of its answer, fields of shape (1, 1).
        """
        instance, kept = staged.episode.instance, staged.kept
        assert instance.full is not None
        encoded = instance.encoded
        words = int(encoded.lengths[0] - encoded.answer_lengths[0]) - staged.count
        lengths = self.schedule.lengths(words, staged.count, kept)
        staged.ending = {
            "log_likelihood": float(scores.log_likelihood),
            "correct": bool(scores.correct),
            "flops_saved": flops_saved(self.vlm.model.config, words + staged.count, lengths),
            "layer_average_tokens": self.schedule.spent(staged.count, kept) / self.schedule.layers,
        }
        return float(self.rules.reward(scores, instance.full))

    # -- what the agent is told --------------------------------------------------------------------------

    def start_info(self, staged: StagedEpisode) -> dict[str, Any]:
        """Return the info of a reset."""
        places = self.schedule.places(staged.count, staged.episode.k)
        return {
            **self.rules.start_info(staged.episode),
            "k": self.allowance(staged),
            "stage": 0,
            "layer": self.schedule.stages[0],
            "layer_average_budget": places / self.schedule.layers,
        }

    def step_info(self, staged: StagedEpisode) -> dict[str, Any]:
        """Return the info of a step, which tells of the stage that was decided last."""
        stage, decision = len(staged.decisions) - 1, staged.decisions[-1]
        instance = staged.episode.instance
        assert instance.full is not None
        info: dict[str, Any] = {
            "stage": stage,
            "layer": self.schedule.stages[stage],
            "k": decision.k,
            # a list, because Gymnasium's vector environments stack arrays, and these differ in length
            "kept": [int(token) for token in np.flatnonzero(decision.selection)],
            "over_budget": decision.over_budget,
            "full_log_likelihood": float(instance.full.log_likelihood),
            **(staged.ending or {}),
        }
        relevant = instance.relevant()
        return info if relevant is None else info | {"relevant": relevant}


class StageRollout:
    """Episodes in lock-step: they come to each stage together and share one pass through the language model."""

    def __init__(self, rules: StageRules, episodes: list[StagedEpisode]) -> None:
        self.rules = rules
        self.episodes = episodes
        encoded = Encoded.concatenate([staged.episode.instance.encoded for staged in episodes])
        self._run: StagedForward | None = StagedForward(rules.vlm, encoded)
        self._run.advance(rules.schedule.stages[0])
        self._look()

    def _look(self) -> None:
        assert self._run is not None
        self._tokens = self.rules.rules.features(to_array(self._run.hidden()))  # (B, N, F)
        if self.rules.attention:
            self._attention = to_array(self._run.attention())  # (B, N)

    @property
    def stage(self) -> int:
        """Which stage is to be decided; the number of stages after the last."""
        return len(self.episodes[0].decisions)

    @property
    def ended(self) -> bool:
        """Whether every stage is decided."""
        return self._run is None

    def step(self, actions: np.ndarray, generators: Sequence[np.random.Generator]) -> list[float]:
        """Decide the current stage everywhere and run the model up to the next, or to its answer.

        Args:
            actions: Checked, (B, N).
            generators: One for each episode; only an action over budget draws from it.

        Returns:
            The rewards.
        """
        run, schedule, base = self._run, self.rules.schedule, self.rules.rules
        assert run is not None
        decisions = [
            self.rules.decide(staged, action, generator)
            for staged, action, generator in zip(self.episodes, actions, generators, strict=True)
        ]
        for staged, decision in zip(self.episodes, decisions, strict=True):
            staged.decisions.append(decision)
        tokens = self._tokens.shape[1]
        run.drop(torch.from_numpy(np.stack([fit(decision.selection, tokens) for decision in decisions])))
        rewards = [0.0 - base.penalty * decision.over_budget for decision in decisions]
        if self.stage < len(schedule):
            run.advance(schedule.stages[self.stage])
            self._look()
            return rewards
        self._look()
        full = [staged.episode.instance.full for staged in self.episodes]
        reference = Scores.concatenate([scores for scores in full if scores is not None]).first_token
        scores = run.finish(reference).cpu()
        self._run = None
        return [
            reward + self.rules.end(staged, scores[row : row + 1])
            for row, (staged, reward) in enumerate(zip(self.episodes, rewards, strict=True))
        ]

    def observe(self) -> list[Observation]:
        """Return a fresh observation of each episode."""
        return [self._observe(row, staged) for row, staged in enumerate(self.episodes)]

    def _observe(self, row: int, staged: StagedEpisode) -> Observation:
        rules, schedule, alive = self.rules.rules, self.rules.schedule, staged.alive
        stage, budget = np.zeros(len(schedule), dtype=np.int8), 0.0
        if self.stage < len(schedule):
            stage[self.stage] = 1
            budget = self.rules.allowance(staged) / max(1, int(alive.sum()))
        remaining = schedule.remaining(staged.count, staged.episode.k, staged.kept)
        observation = rules.observe(staged.episode) | {
            "tokens": fit(self._tokens[row], rules.max_tokens),
            "token_mask": alive.astype(np.int8),
            "positions": staged.episode.instance.positions * alive[:, None],
            "budget": np.array([budget], dtype=np.float32),
            "remaining": np.array([remaining], dtype=np.float32),
            "stage": stage,
        }
        if self.rules.attention:
            observation["attention"] = fit(self._attention[row], rules.max_tokens)
        return observation
