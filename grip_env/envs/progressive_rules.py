"""Rules of pruning in stages, shared by the single and the vector environment."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces

from grip_env.envs.core.checks import check_flag
from grip_env.envs.core.instances import fit, to_array
from grip_env.envs.core.rules import Decision, Episode, Fixed, Observation, Outcome, stack_full_scores
from grip_env.envs.core.sampling import Budget, tokens_in_budget
from grip_env.envs.pruning_schedule import PruningSchedule, total_budget
from grip_env.envs.selection import SelectionRules
from grip_env.vlms.base import Encoded
from grip_env.vlms.decoder.staged_forward import StagedForward, decoder_of
from grip_env.vlms.flops import flops_saved

__all__ = ["StageDecision", "StageRules", "StagedEpisode"]


class StageDecision(NamedTuple):
    """Decision at a stage: the tokens that survive it."""

    selection: np.ndarray
    """Surviving tokens, bool (N,)."""
    k: int
    """Number of tokens that could have survived."""
    over_budget: int


class Boundary(NamedTuple):
    """Position in the model of B episodes in lock-step: before the layer of a stage.

    After the last decision, it is before the layer of the last stage. The episodes share one pass through the language
    model; nothing here is ever written to.
    """

    run: StagedForward | None
    """``None`` once the model has answered."""
    tokens: np.ndarray
    """Hidden states as in an observation, (B, N, F)."""
    attention: np.ndarray | None
    """float32 (B, N); ``None`` where the agent does not see it."""


@dataclass
class StagedEpisode(Episode):
    """State of an episode: one instance, one budget, and the decisions so far.

    ``selection`` is the mask of tokens that survived so far, at first all real ones.
    """

    stages: list[StageDecision] = field(default_factory=list)
    """Decision at each stage so far."""
    boundary: Boundary | None = None
    row: int = 0
    """Row of the episode at the boundary."""

    def __post_init__(self) -> None:
        self.selection = self.instance.real

    @property
    def kept_per_stage(self) -> list[int]:
        """Number of tokens that survived each stage so far."""
        return [int(stage.selection.sum()) for stage in self.stages]


class StageRules(SelectionRules):
    """Rules of one decision for each stage.

    Episodes that begin together and are decided together go through the model together.

    Args:
        stages: Decoder layers before which tokens can be dropped.
        budget: Share of the tokens, mean over all layers; 0.1 if neither this nor ``stage_budgets`` is given.
        stage_budgets: Share of the tokens that may survive each stage; ``None`` if the budget is for all layers.
        attention: Whether the agent sees how the prompt attends to the tokens.
        common: The other arguments of :class:`~grip_env.envs.progressive.ProgressivePruningEnv`.

    Raises:
        NotImplementedError: If the model's layers cannot be run one by one.
        ValueError: If stages or budgets are impossible.
    """

    def __init__(
        self,
        *,
        stages: Sequence[int],
        budget: Budget | None,
        stage_budgets: Sequence[float] | None,
        attention: bool,
        **common: Any,
    ) -> None:
        check_flag("attention", attention)
        super().__init__(budget=total_budget(budget, stage_budgets), **common)
        self.attention = attention
        self.model: Any = self.vlm  # decoder_of() checks that its layers can be run one by one
        self.schedule = PruningSchedule(stages, len(decoder_of(self.model).layers), stage_budgets)
        self.one_step = len(self.schedule) == 1
        lowest = min(self.budget) if isinstance(self.budget, tuple | list) else self.budget
        self._check_share(lowest)
        fields: dict[str, spaces.Space[Any]] = {
            **self.observation_space.spaces,
            "remaining": spaces.Box(0.0, 1.0, (1,), np.float32),
            "stage": spaces.MultiBinary(len(self.schedule)),
        }
        if attention:
            fields["attention"] = spaces.Box(0.0, 1.0, (self.max_tokens,), np.float32)
        self.observation_space = spaces.Dict(fields)

    def _check_share(self, share: float) -> None:
        self.schedule.check_total(tokens_in_budget(share, self.max_tokens), self.max_tokens)

    def check_options(self, options: dict[str, Any] | None) -> Fixed:
        """Return the values that the options of a reset fix.

        Raises:
            ValueError: Also for a budget that the stages make impossible, or if stages have budgets of their own.
        """
        fixed = super().check_options(options)
        if fixed.budget is not None:
            if self.schedule.shares is not None:
                raise ValueError(
                    f"the reset option 'budget' has no meaning here: stage_budgets={self.schedule.shares} say how many "
                    "tokens may survive"
                )
            self._check_share(fixed.budget)
        return fixed

    def allowance(self, episode: StagedEpisode) -> int:
        """Return the number of tokens that may survive the next stage."""
        return self.schedule.allowance(episode.instance.count, episode.k, episode.kept_per_stage)

    def decide(self, episode: Episode, action: np.ndarray, generator: np.random.Generator) -> Decision:
        """Turn a checked action (N,) into a selection of surviving tokens, as a decision.

        The episode does not change. Only a binary action over budget, or tied scores, draw from ``generator``.
        """
        assert isinstance(episode, StagedEpisode)
        candidates = episode.selection
        if self.action_mode == "scores" and self.schedule.shares is None:
            candidates = candidates & (action > 0)
        # for the rules of a single decision, a stage is an episode whose only real tokens are the candidates
        stage = Episode(replace(episode.instance, real=candidates), self.allowance(episode))
        decision = super().decide(stage, action, generator)
        last = len(episode.stages) + 1 == len(self.schedule)
        return decision._replace(episode=episode, scored=last, ends=last)

    # -- the pass through the model --------------------------------------------------------------------------

    def advance(self, decisions: Sequence[Decision] = (), requests: Sequence[tuple[int, float]] = ()) -> list[Episode]:
        """Carry out decisions and begin episodes.

        The model runs up to the next stage or the answer of each episode decided, and to the first stage of new ones.

        Args:
            decisions: Decisions to carry out, at most one for each episode; episodes at the same boundary share a pass
                through the model.
            requests: (index, budget) of each episode that begins.

        Raises:
            ValueError: If an instance has more tokens than there is room for, or so few that the budget is impossible.
        """
        begun = [StagedEpisode(episode.instance, episode.k) for episode in super().advance(requests=requests)]
        for episode in begun:
            self.schedule.check_total(episode.k, episode.instance.count)
        # compute everything before anything changes: if an error is raised, every episode is unchanged
        together: dict[int, list[Decision]] = {}
        for decision in decisions:
            together.setdefault(id(_staged(decision.episode).boundary), []).append(decision)
        passes = [(group, *self._go_on(group)) for group in together.values()]
        start = self._begin(begun) if begun else None
        for group, boundary, outcomes in passes:
            for row, (decision, outcome) in enumerate(zip(group, outcomes, strict=True)):
                episode = _staged(decision.episode)
                stage = StageDecision(decision.selection, self.allowance(episode), decision.violations)
                self._carry_out(decision, outcome)
                episode.stages.append(stage)
                episode.boundary, episode.row = boundary, row
        for row, episode in enumerate(begun):
            episode.boundary, episode.row = start, row
        return list(begun)

    def _begin(self, episodes: Sequence[StagedEpisode]) -> Boundary:
        run = StagedForward(self.model, Encoded.concatenate([episode.instance.encoded for episode in episodes]))
        run.advance(self.schedule.stages[0])
        return self._seen(run)

    def _go_on(self, decisions: Sequence[Decision]) -> tuple[Boundary, list[Outcome | None]]:
        """Run the model on the surviving tokens up to the next stage or the answer.

        Returns:
            The boundary where it stops, and the outcome of each episode, ``None`` before the end.
        """
        episodes = [_staged(decision.episode) for decision in decisions]
        boundary, stage = episodes[0].boundary, len(episodes[0].stages) + 1
        assert boundary is not None
        assert boundary.run is not None
        rows = [episode.row for episode in episodes]
        # a pass never writes to its tensors, so the previous one is unchanged
        run = copy.copy(boundary.run) if rows == [*range(len(boundary.run))] else boundary.run[rows]
        keep = np.stack([fit(decision.selection, run.alive.shape[1]) for decision in decisions])  # (B, N)
        run.drop(torch.from_numpy(keep))
        if stage < len(self.schedule):
            run.advance(self.schedule.stages[stage])
            return self._seen(run), [None] * len(decisions)
        end, full = self._seen(run)._replace(run=None), stack_full_scores(episodes)
        assert full is not None
        return end, list(self._judge(run.finish(full.first_token).cpu(), full, episodes))

    def _seen(self, run: StagedForward) -> Boundary:
        def padded(values: np.ndarray) -> np.ndarray:
            return (
                values
                if values.shape[1] == self.max_tokens
                else np.stack([fit(row, self.max_tokens) for row in values])
            )

        tokens = self.features(to_array(run.hidden()))
        attention = padded(to_array(run.attention())) if self.attention else None
        return Boundary(run, padded(tokens), attention)

    # -- observations and infos --------------------------------------------------------------------------

    def shared_view(self, episode: Episode) -> Observation:
        """Return an observation that shares memory with others."""
        assert isinstance(episode, StagedEpisode)
        assert episode.boundary is not None
        instance, alive, number = episode.instance, episode.selection, len(episode.stages)
        stage, budget = np.zeros(len(self.schedule), dtype=np.int8), 0.0
        if number < len(self.schedule):
            stage[number] = 1
            budget = self.allowance(episode) / max(1, int(alive.sum()))
        remaining = self.schedule.remaining(instance.count, episode.k, episode.kept_per_stage)
        observation = super().shared_view(episode) | {
            "tokens": episode.boundary.tokens[episode.row],
            "token_mask": alive.astype(np.int8),
            "positions": instance.positions * alive[:, None],
            "budget": np.array([budget], dtype=np.float32),
            "remaining": np.array([remaining], dtype=np.float32),
            "stage": stage,
        }
        if episode.boundary.attention is not None:
            observation["attention"] = episode.boundary.attention[episode.row]
        return observation

    def info(self, episode: Episode) -> dict[str, Any]:
        """Return the info of a reset, about the first stage, or of a step, about the last decision."""
        assert isinstance(episode, StagedEpisode)
        number, decided = max(0, len(episode.stages) - 1), episode.stages[-1] if episode.stages else None
        slots = self.schedule.slots(episode.instance.count, episode.k)
        return super().info(episode) | {
            "stage_index": number,
            "layer": self.schedule.stages[number],
            "k": self.allowance(episode) if decided is None else decided.k,
            "over_budget": 0 if decided is None else decided.over_budget,
            "layer_average_budget": slots / self.schedule.layers,
            **(self.savings(episode) if episode.over else {"layer_average_tokens": 0.0, "flops_saved": 0.0}),
        }

    def savings(self, episode: StagedEpisode) -> dict[str, float]:
        """Return ``layer_average_tokens`` and ``flops_saved`` of a finished episode."""
        encoded, count, kept_per_stage = episode.instance.encoded, episode.instance.count, episode.kept_per_stage
        words = int(encoded.lengths[0] - encoded.answer_lengths[0]) - count
        lengths = self.schedule.lengths(words, count, kept_per_stage)
        return {
            "layer_average_tokens": self.schedule.spent(count, kept_per_stage) / self.schedule.layers,
            "flops_saved": flops_saved(self.model.model.config, words + count, lengths),
        }


def _staged(episode: Episode) -> StagedEpisode:
    assert isinstance(episode, StagedEpisode)
    return episode
