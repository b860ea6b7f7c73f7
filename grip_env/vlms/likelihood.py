"""Scores of answers from logits, shared by scoring as a whole and layer by layer.

R sequences, T tokens of the longest answer, V tokens of the vocabulary. Ids after the end of an answer are -100.
"""

from __future__ import annotations

import torch

__all__ = ["answer_columns", "greedy_finds", "mean_log_likelihood", "negative_divergence"]


def answer_columns(begin: torch.Tensor, lengths: torch.Tensor, elsewhere: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the columns of the answers' ids in their sequences.

    Args:
        begin: Column of each answer's first id, long (R,).
        lengths: Number of ids of each answer, long (R,).
        elsewhere: Column used after the end of an answer; any that exists and has one before it.

    Returns:
        Columns, long (R, T), and a mask of the real ones, bool (R, T).
    """
    offset = torch.arange(int(lengths.max()), device=lengths.device)  # (T,)
    real = offset < lengths[:, None]
    return torch.where(real, begin[:, None] + offset, elsewhere), real


def mean_log_likelihood(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean log-probability of each answer's ids, in nats: float (R,).

    Args:
        logits: Logits that predict each id, float (R, T, V); gradients flow to them.
        targets: The ids, long (R, T), at least one in each row.

    >>> mean_log_likelihood(torch.tensor([[[0.0, 0.0], [5.0, 0.0]]]), torch.tensor([[1, -100]]))
    tensor([-0.6931])
    """
    real = targets != -100
    chosen = logits.log_softmax(-1).gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    return torch.where(real, chosen, 0).sum(-1) / real.sum(-1)


def greedy_finds(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return whether greedy decoding begins with the answer, bool (R,).

    The arguments are those of :func:`mean_log_likelihood`.
    """
    return ((logits.argmax(-1) == targets) | (targets == -100)).all(-1)


def negative_divergence(reference: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """Return -KL(reference || other) of two distributions, in nats; never above 0.

    Args:
        reference: Log-probabilities of the reference, float (..., V), finite.
        log_probs: Log-probabilities of the other distribution, float (..., V), finite.

    Returns:
        float (...).

    >>> uniform = torch.tensor([0.5, 0.5]).log()
    >>> negative_divergence(uniform, torch.tensor([0.25, 0.75]).log())  # (log 2 + log 2/3) / 2
    tensor(-0.1438)
    """
    # rounding can make a divergence near 0 negative
    return (reference.exp() * (log_probs - reference)).sum(-1).clamp_max(0)
