"""Base class of searches, and the scoring of candidates under a budget of calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from grip_env.common.finite import NonFiniteError, name_of
from grip_env.rewards.judging import RewardScorer
from grip_env.rewards.parsing import resolve_reward
from grip_env.rewards.terms import Reward
from grip_env.vlms.base import Encoded, FrozenVLM, Scores

__all__ = ["ScoredCandidates", "Search", "SearchResult", "check_batch", "leading"]


def check_batch(encoded: Encoded, counts: torch.Tensor) -> torch.Tensor:
    """Return how many tokens a search keeps of each example, long (B,).

    This is ``counts``, or the number of real tokens where there are fewer.

    Raises:
        ValueError: If an example has no answer, or ``counts`` is not B integers of at least 1.
    """
    unanswered = (encoded.answer_lengths == 0).nonzero().flatten().tolist()
    if unanswered:
        raise ValueError(
            f"a search uses the answer, and example {unanswered[0]} of the batch has none: encode the examples with "
            "their answers, or choose a selector that does not need them"
        )
    if (
        counts.shape != (len(encoded),)
        or counts.is_floating_point()
        or counts.is_complex()
        or counts.dtype == torch.bool
    ):
        raise ValueError(
            f"counts must be integers of shape ({len(encoded)},), one for each example; got {counts.dtype} of shape "
            f"{tuple(counts.shape)}"
        )
    if int(counts.min()) < 1:
        raise ValueError(f"a search keeps at least 1 token of each example; got {int(counts.min())}")
    return counts.long().to(encoded.token_mask.device).minimum(encoded.token_mask.sum(1))


def leading(counts: torch.Tensor) -> torch.Tensor:
    """Return a mask of the first ``counts`` (B,) places of each row, bool (B, max)."""
    return torch.arange(int(counts.max()), device=counts.device) < counts[:, None]


class ScoredCandidates:
    """Calls used for B examples, and the best selection of exactly k tokens of each so far.

    A *call* is one selection of one example that the frozen model scores. If examples have different numbers of
    candidates in a round, the rows of the shorter ones are filled with empty selections: these are the shortest
    possible sequences, their scores are dropped and they are not counted.

    Args:
        vlm: The frozen model.
        encoded: B examples.
        counts: How many tokens to keep of each, as :func:`check_batch` returns it.
        reward: Reward to maximise; ``None`` for the mean log-likelihood of the answer's tokens, in nats. A reward also
            gets the scores of the full image, which cost one call of each example.
        calls: Maximum number of calls for each example.

    An example with only as many tokens as it has to keep needs no search: its only selection is scored here.
    """

    def __init__(
        self, vlm: FrozenVLM, encoded: Encoded, counts: torch.Tensor, reward: Reward | str | None, calls: int
    ) -> None:
        self.vlm, self.encoded, self.counts = vlm, encoded, counts
        self.mask = encoded.token_mask  # (B, N)
        self.used = torch.zeros_like(counts)  # (B,)
        self.best = torch.zeros_like(self.mask)  # (B, N)
        self.value = torch.full(counts.shape, -torch.inf, device=counts.device)  # (B,)
        self._rewards = None if reward is None else RewardScorer(vlm, resolve_reward(reward))
        self._full: Scores | None = None
        self._calls = calls
        if self._rewards is not None:
            self._full = self._rewards.full(encoded).cpu()
            self.used += 1
        self.forced = counts == self.mask.sum(1)  # (B,)
        if self.forced.any():
            self.score(encoded.full_selection(), self.forced[:, None])

    @property
    def left(self) -> torch.Tensor:
        """Calls left for each example, long (B,); 0 where there is nothing to search."""
        return (self._calls - self.used).masked_fill(self.forced, 0)

    def reference(self, rows: torch.Tensor) -> torch.Tensor | None:
        """Return the ``reference`` with which the model scores selections of some examples.

        See :meth:`~grip_env.vlms.base.FrozenVLM.score`.

        Args:
            rows: Indices of the examples, long (R,).
        """
        first = None if self._full is None else self._full.first_token
        return None if first is None else first[rows.cpu()]

    def judge(self, scores: Scores, rows: torch.Tensor) -> torch.Tensor:
        """Return the rewards of scores, float32 (R, G), in main memory.

        Args:
            scores: Scores of R examples.
            rows: Indices of the examples, long (R,).

        Raises:
            ValueError: If the reward returns another shape.
        """
        scores = scores.cpu()
        if self._rewards is None or self._full is None:
            return scores.log_likelihood
        examples = [self.encoded.examples[row] for row in rows.tolist()]
        return self._rewards.judge(scores, self._full[rows.cpu()], examples=examples).float()

    def score(self, candidates: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Score candidates of all examples in one call of the model.

        Args:
            candidates: Non-empty selections of real tokens, bool (B, G, N).
            valid: Mask of the candidates to score, bool (B, G); the others cost nothing.

        Returns:
            Their values, float32 (B, G); -inf for candidates that are not valid.

        Raises:
            ValueError: If this would exceed the budget of calls, or a value is not finite.
        """
        asked = valid.sum(1)
        if bool((self.used + asked > self._calls).any()):
            over = int((self.used + asked).max())
            raise ValueError(f"this would take {over} calls of an example, and the budget is {self._calls}")
        values = torch.full(valid.shape, -torch.inf, device=valid.device)
        rows = asked.nonzero().flatten()  # examples that are done are left out
        if not len(rows):
            return values
        part = self.encoded if len(rows) == len(self.encoded) else self.encoded[rows]
        chosen = candidates[rows] & valid[rows, :, None]
        worth = self.judge(self.vlm.score(part, chosen, reference=self.reference(rows)), rows)
        values[rows] = worth.to(values.device).masked_fill(~valid[rows], -torch.inf)
        bad = valid & ~values.isfinite()
        if bool(bad.any()):
            named = name_of(self.encoded.examples[int(bad.any(1).nonzero()[0])])
            raise NonFiniteError(
                f"the reward of a selection of {named} is not finite: check the reward, or the model's precision"
            )
        self.used += asked
        self._remember(candidates, values.masked_fill(candidates.sum(-1) != self.counts[:, None], -torch.inf))
        return values

    def record(self, row: int, selection: torch.Tensor, value: float, calls: int) -> None:
        """Record a result of one example that was found elsewhere.

        Args:
            row: Index of the example.
            selection: The selection, bool (N,).
            value: Its value.
            calls: Calls that were used to find it.
        """
        self.used[row] += calls
        self.best[row], self.value[row] = selection.to(self.best.device), value

    def _remember(self, candidates: torch.Tensor, values: torch.Tensor) -> None:
        """Keep the first best candidate of each example if it beats the best so far."""
        value, place = values.max(1)
        batch = torch.arange(len(place), device=place.device)
        better = value > self.value
        self.best[better] = candidates[batch, place][better]
        self.value[better] = value[better]


@dataclass(frozen=True)
class SearchResult:
    """Result of a search on B examples, and its cost."""

    selection: torch.Tensor
    """The best selection of exactly k tokens that was scored, bool (B, N)."""
    value: torch.Tensor
    """Value of that selection: mean answer log-likelihood in nats per token, or the reward; float32 (B,)."""
    calls: torch.Tensor
    """Number of selections scored, long (B,)."""
    stopped: tuple[str, ...]
    """Reason why the search of each example ended: "budget" (no calls left), "only choice" (no more tokens than to be
    kept), or the search's own word for having finished, such as "local optimum"."""


@dataclass(frozen=True)
class Search(ABC):
    """Selector that uses the answer; see :class:`agents.base.Selector` for the call.

    Args:
        calls: Maximum number of selections to score for each example.
        reward: Reward to maximise: an object or its name, as in the environments. It also gets the scores of the full
            image, which is scored first and counts as a call. ``None``: the mean log-likelihood of the answer's tokens,
            which has the same best selections as the environments' default and does not need the full image.

    Raises:
        ValueError: If ``calls`` is too small to score anything; when called, if an example has no answer, ``counts``
            is not B integers of at least 1, or a reward is not finite.
        TypeError: If the reward is invalid.
    """

    calls: int = 1000
    reward: Reward | str | None = None

    uses_answer: ClassVar[bool] = True
    """Marks searches, so that comparisons can tell them from pruners."""
    title: ClassVar[str]
    finish: ClassVar[str]
    """Reason to stop other than a lack of calls."""

    def __post_init__(self) -> None:
        if self.reward is not None:
            resolve_reward(self.reward)
        if self.calls < self._least():
            raise ValueError(f"{self.title} needs a budget of at least {self._least()} calls; got {self.calls}")

    @property
    def label(self) -> str:
        """Name for tables."""
        return f"{self.title} (uses the answer)"

    @torch.no_grad()
    def search(
        self, vlm: FrozenVLM, encoded: Encoded, counts: torch.Tensor, generator: torch.Generator
    ) -> SearchResult:
        """Search, and return the result and its cost.

        The arguments are the same as of a :class:`~agents.base.Selector`.
        """
        counts = check_batch(encoded, counts)
        trials = ScoredCandidates(vlm, encoded, counts, self.reward, self.calls)
        done = self._run(trials, generator).tolist()
        reasons = [
            "only choice" if forced else self.finish if ended else "budget"
            for forced, ended in zip(trials.forced.tolist(), done, strict=True)
        ]
        return SearchResult(trials.best, trials.value, trials.used, tuple(reasons))

    def __call__(
        self, vlm: FrozenVLM, encoded: Encoded, counts: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Return the best selection found, bool (B, N), of exactly k real tokens in each row."""
        return self.search(vlm, encoded, counts, generator).selection

    def _overhead(self) -> int:
        return int(self.reward is not None)

    def _least(self) -> int:
        return 1 + self._overhead()

    @abstractmethod
    def _run(self, trials: ScoredCandidates, generator: torch.Generator) -> torch.Tensor:
        """Try selections, and return a mask of the examples whose search is complete, bool (B,)."""
