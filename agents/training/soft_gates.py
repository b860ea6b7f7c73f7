"""Soft masks over tokens, and functions to learn hard masks through them."""

from __future__ import annotations

import math

import torch

__all__ = [
    "CLOSED_BELOW",
    "binary_gates",
    "budget_offset",
    "budget_penalty",
    "gumbel_noise",
    "relaxed_top_k",
    "straight_through",
]

STRETCH = -0.1, 1.1
"""Ends of the interval to which soft binary gates are stretched before clipping to [0, 1] (Louizos et al. 2018)."""

CLOSED_BELOW = math.log(-STRETCH[0] / STRETCH[1])
"""A stretched gate is exactly 0 where logit plus noise, divided by the temperature, is below this."""


def gumbel_noise(scores: torch.Tensor, samples: int, generator: torch.Generator) -> torch.Tensor:
    """Draw ``samples`` times standard Gumbel noise for scores (B, N), float (S, B, N).

    The k largest of scores + noise are k draws without replacement from the softmax of the scores, which is the
    Plackett-Luce distribution (Kool, van Hoof & Welling, "Stochastic beams and where to find them", ICML 2019).
    """
    uniform = torch.rand(samples, *scores.shape, generator=generator).to(scores.device)
    return -(-uniform.clamp(1e-20, 1 - 1e-7).log()).log()


def relaxed_top_k(scores: torch.Tensor, counts: torch.Tensor, mask: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return a soft mask over the best-scoring tokens: the sum of k successive softmaxes.

    Each softmax excludes what the earlier ones have taken.

    Args:
        scores: float (..., B, N).
        counts: How many tokens to keep, long (B,).
        mask: Which tokens are real, bool (B, N).
        temperature: Above 0; near 0 the mask approaches :func:`agents.base.top_k`.

    Returns:
        float (..., B, N), at least 0, with the sum ``counts`` in each row; above 1 for tokens that score far higher
        than all others.

    Source: Xie & Ermon, "Reparameterizable subset sampling via continuous relaxations", IJCAI 2019 (after Plötz & Roth,
    NeurIPS 2018).

    >>> scores = torch.tensor([[3.0, 1.0, 2.0]])
    >>> relaxed_top_k(scores, torch.tensor([2]), torch.ones(1, 3, dtype=torch.bool), 0.1).round(decimals=2)
    tensor([[1., 0., 1.]])
    """
    left = scores.masked_fill(~mask, -1e9)  # finite: no NaN in rows that run out of tokens
    total = torch.zeros_like(scores)
    for taken in range(int(counts.max())):
        logits = left / temperature
        share = logits.softmax(-1)
        total = total + share * (taken < counts)[:, None]
        # log(1 - share) loses precision if a share is near 1, as at most one can be: there it is computed from the rest
        largest = torch.zeros_like(share, dtype=torch.bool).scatter(-1, logits.argmax(-1, keepdim=True), True)
        others = logits.masked_fill(largest, -1e9 / temperature).logsumexp(-1) - logits.logsumexp(-1)
        left = left + torch.where(largest, others[..., None], (-share.clamp_max(0.5)).log1p())
    return total


def binary_gates(logits: torch.Tensor, uniform: torch.Tensor, temperature: float, stretch: bool) -> torch.Tensor:
    """Return soft gates in [0, 1], which are above 1/2 with probability sigmoid(logits).

    Args:
        logits: float, of any shape; the gates have the same.
        uniform: Uniform noise in (0, 1), same shape; 0.5 for none.
        temperature: Above 0.
        stretch: Stretch gates beyond [0, 1] and clip them to it, so that they can be exactly 0 and 1.

    Sources: Maddison, Mnih & Teh, "The concrete distribution", ICLR 2017; with ``stretch``, Louizos, Welling & Kingma,
    "Learning sparse neural networks through L0 regularization", ICLR 2018.
    """
    gates = ((logits + uniform.logit(eps=1e-7)) / temperature).sigmoid()
    low, high = STRETCH
    return (gates * (high - low) + low).clamp(0, 1) if stretch else gates


def budget_penalty(open_logits: torch.Tensor, counts: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the squared logarithm of (expected number of open gates / k), float (B,).

    Args:
        open_logits: Logits of the probability that a gate is open, float (B, N).
        counts: k, long (B,).
        mask: Which tokens are real, bool (B, N).
    """
    expected = (open_logits.sigmoid() * mask).sum(1)
    return (expected / counts).clamp_min(1e-6).log().square()


def budget_offset(logits: torch.Tensor, counts: torch.Tensor, mask: torch.Tensor) -> float:
    """Return the number to add to all logits (B, N) so that open gates meet the budgets.

    With it, the ratio of the expected number of open gates to the budget is 1 on average.
    """
    low, high = -50.0, 50.0
    for _ in range(40):
        middle = (low + high) / 2
        used = ((logits + middle).sigmoid() * mask).sum(1) / counts
        low, high = (low, middle) if float(used.mean()) > 1 else (middle, high)
    return (low + high) / 2


def straight_through(hard: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
    """Return the values of ``hard`` with the gradient of ``soft``."""
    return hard.to(soft.dtype) + soft - soft.detach()
