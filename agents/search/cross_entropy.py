"""The cross-entropy method over selections of k tokens: a search that uses the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from agents.search.base import ScoredCandidates, Search, leading
from agents.subset import KSubset

__all__ = ["CrossEntropy", "fit_marginals"]


def fit_marginals(
    target: torch.Tensor, counts: torch.Tensor, mask: torch.Tensor, theta: torch.Tensor, rounds: int = 20
) -> torch.Tensor:
    """Return scores for which the k-subset distribution has the marginals ``target``.

    This is the maximum-likelihood fit to selections whose mean is ``target``, as the distribution is an exponential
    family. Each round moves the scores by half the difference in log-odds. Near the solution this shrinks the errors by
    1 - x / 2 for each eigenvalue x of the correlation matrix of the kept tokens. The eigenvalues are at most 2
    (Gershgorin): the rows of the matrix, times the standard deviations, add up to 0, and all entries off the diagonal
    are negative.

    Args:
        target: How often to keep each token, float (B, N) in [0, 1], adding up to k; clamped to within 1e-4 of 0 and 1.
        counts: k of each example, long (B,).
        mask: Which tokens are real, bool (B, N).
        theta: Initial scores, finite, float (B, N).
        rounds: Maximum number of rounds; fewer if no marginal is off by more than 1e-3.

    Returns:
        Finite scores, float32 (B, N).
    """
    for _ in range(rounds):
        marginals = KSubset(theta, counts, mask=mask, validate_args=False).marginals
        if bool(((marginals - target).abs() < 1e-3).all()):
            break
        theta = theta + (target.logit(1e-4) - marginals.logit(1e-4)) / 2
    return theta


@dataclass(frozen=True)
class CrossEntropy(Search):
    """Cross-entropy method: refit a sampling distribution to its best draws (uses the answer).

    The distribution is over k-subsets, uniform at first. A round draws ``group`` selections of each example and moves
    the marginals of the distribution a share ``smoothing`` of the way to the mean of the elite, the best share of the
    round. The search ends when all selections of a round are equal, or with the budget; its result is the best
    selection ever drawn.

    Args:
        group: Selections drawn in a round.
        elite: Share of them that the distribution is fitted to, in (0, 1).
        smoothing: Size of the move towards the elite, in (0, 1].

    Source: De Boer, Kroese, Mannor and Rubinstein, "A tutorial on the cross-entropy method", Annals of Operations
    Research 2005; here over subsets of exactly k instead of independent Bernoulli draws.
    """

    group: int = 64
    elite: float = 0.125
    smoothing: float = 0.7

    title: ClassVar[str] = "cross-entropy method"
    finish: ClassVar[str] = "converged"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group < 2 or not 0 < self.elite < 1 or not 0 < self.smoothing <= 1:
            raise ValueError(
                "group is at least 2, elite in (0, 1) and smoothing in (0, 1]; got "
                f"group={self.group}, elite={self.elite:g}, smoothing={self.smoothing:g}"
            )

    def _run(self, trials: ScoredCandidates, generator: torch.Generator) -> torch.Tensor:
        mask, counts = trials.mask, trials.counts
        marginals = mask * (counts / mask.sum(1))[:, None]  # (B, N)
        theta = torch.zeros_like(marginals)
        converged = torch.zeros_like(trials.forced)
        while (left := trials.left.masked_fill(converged, 0)).any():
            valid = leading(left.clamp_max(self.group))  # (B, G)
            law = KSubset(theta, counts, mask=mask, validate_args=False)
            drawn = law.sample((valid.shape[1],), generator=generator).transpose(0, 1)  # (B, G, N)
            values = trials.score(drawn, valid)
            if valid.shape[1] < self.group:
                break  # too few calls left for a full round
            best = values.argsort(dim=1, descending=True, stable=True)[:, : max(1, round(self.elite * self.group))]
            elite = drawn.gather(1, best[..., None].expand(-1, -1, mask.shape[1])).float().mean(1)  # (B, N)
            marginals = marginals + self.smoothing * (elite - marginals)
            theta = fit_marginals(marginals, counts, mask, theta)
            converged |= (drawn == drawn[:, :1]).flatten(1).all(1) & ~trials.forced
        return converged
