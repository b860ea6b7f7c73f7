"""Supervised warm-up: the scorer learns to pick what a teacher would, before any reward is asked for."""

from __future__ import annotations

import torch

from agents.base import top_k
from agents.scorer import Scorer
from agents.subset import KSubset
from grip_env.vlms.base import Encoded, FrozenVLM

__all__ = ["TEACHERS", "attention_teacher", "gradient_saliency", "relevance_teacher", "warmup_loss"]


def gradient_saliency(vlm: FrozenVLM, encoded: Encoded) -> torch.Tensor:
    """Score tokens by how strongly the answer's log-likelihood depends on them: |gradient x token|, (B, N).

    Uses the answer: a teacher, not a pruner. Source: Simonyan et al., "Deep inside convolutional networks", 2013,
    in the gradient-times-input form of Shrikumar et al., 2016.
    """
    tokens = encoded.tokens.detach().clone().requires_grad_()
    with torch.enable_grad():
        total = vlm.log_likelihood(encoded, encoded.full_selection(), tokens).sum()
        (gradient,) = torch.autograd.grad(total, tokens)
    return (gradient * tokens.detach()).sum(-1).abs()


def attention_teacher(vlm: FrozenVLM, encoded: Encoded) -> torch.Tensor:
    """Score tokens by the attention they get from the vision tower's CLS token, (B, N). Knows no question."""
    return vlm.attention(encoded, "cls")


def relevance_teacher(vlm: FrozenVLM, encoded: Encoded) -> torch.Tensor:
    """Score tokens by the ground truth, (B, N). Only for tasks that have one."""
    relevance = encoded.relevance()
    if relevance is None:
        raise ValueError("the relevance teacher needs a task with ground truth: choose another teacher")
    return relevance


TEACHERS = {"gradient": gradient_saliency, "attention": attention_teacher, "relevance": relevance_teacher}
"""Teachers by name."""


def warmup_loss(scorer: Scorer, encoded: Encoded, teacher: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return the mean negative log-likelihood, per kept token, of the teacher's top-k subset.

    Args:
        scorer: What is trained.
        encoded: B examples.
        teacher: The teacher's scores, (B, N).
        kept: Subset sizes, long (B,).
    """
    target = top_k(teacher, kept, encoded.token_mask)
    policy = KSubset(scorer.score(encoded, kept), kept, mask=encoded.token_mask, validate_args=False)
    return -(policy.log_prob(target) / kept).mean()
