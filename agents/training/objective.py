"""Objective of policy-gradient steps: advantages, clipped surrogate, KL and entropy."""

from __future__ import annotations

import torch

from agents.ordered_subset import OrderedSubset
from agents.subset import KSubset
from agents.training.grpo_config import Objective

__all__ = ["advantages", "policy_objective", "surrogate"]


def advantages(
    rewards: torch.Tensor,
    scale: str = "group",
    floor: float = 0.1,
    baseline: str = "group_mean",
    value: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the advantage of each subset over its baseline, (B, G).

    Args:
        rewards: float (B, G).
        scale: Divide by the root mean square of the differences in the "group" or in the whole "batch", or do not
            divide ("none"). With the group's mean as baseline, "group" divides by the group's standard deviation.
            TRL's "group" has Bessel's correction (G - 1); its "batch" is the deviation of raw rewards, not of
            differences.
        floor: Added to that root mean square.
        baseline: "group_mean" (the mean of all G rewards), "leave_one_out" (the mean of the other G - 1, which makes
            the differences G / (G - 1) times as large) or "learned".
        value: The learned baseline, float (B,); ``None`` for the other baselines.

    Raises:
        ValueError: If the scale or baseline is unknown, or ``value`` does not match the baseline.

    >>> advantages(torch.tensor([[1.0, 3.0]]), "none")
    tensor([[-1.,  1.]])
    >>> advantages(torch.tensor([[1.0, 3.0]]), "none", baseline="leave_one_out")
    tensor([[-2.,  2.]])
    """
    if (baseline == "learned") != (value is not None):
        raise ValueError(f"the learned baseline has a value, and no other; got baseline={baseline!r}, value={value}")
    if value is not None:
        centred = rewards - value[:, None]
    else:
        centred = rewards - rewards.mean(1, keepdim=True)
        if baseline == "leave_one_out":
            centred = centred * (rewards.shape[1] / (rewards.shape[1] - 1))
        elif baseline != "group_mean":
            raise ValueError(f"unknown baseline {baseline!r}: choose group_mean, leave_one_out or learned")
    if scale == "group":
        return centred / (centred.square().mean(1, keepdim=True).sqrt() + floor)
    if scale == "batch":
        return centred / (centred.square().mean().sqrt() + floor)
    if scale == "none":
        return centred
    raise ValueError(f"unknown advantage scale {scale!r}: choose group, batch or none")


def surrogate(
    log_prob: torch.Tensor, old: torch.Tensor, advantage: torch.Tensor, clip_low: float, clip_high: float
) -> torch.Tensor:
    """Return the clipped surrogate objective of each subset, in the shape of the inputs.

    The objective is to be maximised.

    Sources: Schulman et al., "Proximal policy optimization algorithms", 2017; separate clipping bounds: Yu et al.
    (DAPO), 2025.
    """
    ratio = (log_prob - old).exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)


def policy_objective(
    policy: KSubset | OrderedSubset,
    log_prob: torch.Tensor,
    old: torch.Tensor,
    advantage: torch.Tensor,
    settings: Objective,
    counted: torch.Tensor | None = None,
    reference: KSubset | OrderedSubset | None = None,
) -> torch.Tensor:
    """Return the objective that one update maximises, a scalar.

    It is the mean surrogate, minus the weighted KL to the reference, plus the weighted entropy per kept token. KL and
    entropy apply to the k-subset distribution only; neither is known if tokens are chosen one after another.

    Args:
        policy: Distribution over the subsets of B examples.
        log_prob: Log-probabilities of the subsets drawn, (G, B).
        old: Log-probabilities at the time they were drawn, (G, B).
        advantage: (G, B).
        settings: Clipping and weights.
        counted: Examples whose groups count in the surrogate, bool (B,); all by default. KL and entropy are over all.
        reference: Reference distribution of the KL; needed if the KL has a weight.
    """
    each = surrogate(log_prob, old, advantage, settings.clip_low, settings.clip_high)
    # without any counted group this is 0 with a gradient of 0, so that KL and entropy still act
    result = each.mean() if counted is None else (each * counted).sum() / (len(each) * counted.sum()).clamp_min(1)
    if settings.kl_weight and isinstance(policy, KSubset) and isinstance(reference, KSubset):
        result = result - settings.kl_weight * torch.distributions.kl_divergence(policy, reference).mean()
    if settings.entropy_weight and isinstance(policy, KSubset):
        result = result + settings.entropy_weight * (policy.entropy() / policy.k).mean()
    return result
