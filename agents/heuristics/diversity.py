"""Selectors that keep diverse tokens: max-min diversity and determinantal point processes."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn.functional import normalize

from grip_env.vlms.base import Encoded, FrozenVLM

__all__ = ["CDPruner", "cosine", "max_min_diversity", "question_relevance"]

NO_VOLUME = 1e-6
"""Squared volume below which a token counts as a linear combination of the kept ones; less is rounding error."""


def cosine(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the cosine of each pair of vectors, (B, N, M), in float64 (float32 on MPS).

    The cosine is 0 if one of the vectors is zero. It is rounded to nine decimals: equal vectors tie exactly, and the
    order of summation, which depends on the batch, does not decide between them.

    Args:
        left: float (B, N, D).
        right: float (B, M, D).
    """
    kind = torch.float32 if left.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    return (normalize(left.to(kind), dim=-1) @ normalize(right.to(kind), dim=-1).mT).round(decimals=9)


def max_min_diversity(
    vlm: FrozenVLM, encoded: Encoded, counts: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Keep tokens greedily, each the farthest in cosine distance from its nearest kept one.

    The first pick is the token whose distance to its nearest neighbour is largest. Ties go to the lower index: two
    tokens that are each other's nearest often tie for the first pick. Without ties, the choice is equivariant to
    permutations of the tokens.
    Source: Alvar et al., "DivPrune: diversity-based visual token pruning for large multimodal models", CVPR 2025.
    """
    mask = encoded.token_mask
    counts = torch.minimum(counts, mask.sum(1))
    distance = 1 - cosine(encoded.tokens, encoded.tokens)  # (B, N, N)
    batch = torch.arange(len(encoded), device=mask.device)
    itself = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    others = distance.masked_fill(itself | ~mask[:, None], torch.inf)
    nearest = others.amin(2)  # (B, N)
    chosen = torch.zeros_like(mask)
    for step in range(int(counts.max())):
        pick = nearest.masked_fill(chosen | ~mask, -torch.inf).argmax(1)  # (B,)
        going_on = step < counts
        chosen[batch[going_on], pick[going_on]] = True
        reached = distance[batch, pick]
        nearest = reached if step == 0 else torch.minimum(nearest, reached)
    return chosen


def question_relevance(encoded: Encoded, sign: int = 1) -> torch.Tensor:
    """Return how well each token fits the question, in [0, 1], (B, N).

    The relevance is ``sign`` times the mean over the question's words of the cosine between token and word, both as the
    language model gets them, scaled within each image to 0 for the worst token and 1 for the best. If all tokens fit
    equally well, or there is no question, it is 1. Padding has 0.

    Args:
        encoded: B examples.
        sign: 1, or -1 to prefer the tokens that fit least.
    """
    mask = encoded.token_mask
    words = encoded.question_mask[:, None]  # (B, 1, Q)
    match = (cosine(encoded.tokens, encoded.question) * words).sum(2) / words.sum(2).clamp_min(1)
    match = (sign * match).round(decimals=9)
    low = match.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    high = match.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
    spread = high - low
    scaled = torch.where(spread > 0, (match - low) / spread.where(spread > 0, 1), 1)
    return scaled * mask


class CDPruner:
    """Selector that keeps the most diverse tokens given the question.

    It searches greedily for the MAP of a determinantal point process. The kernel is L[i, j] = r[i] S[i, j] r[j], where
    S are the cosines of the tokens as the language model gets them and r is their relevance to the question. Each step
    keeps the token that raises det L of the kept ones most, by incremental Cholesky; ties go to the lower index. Once
    no token adds volume, the most relevant ones are kept first: there are at most D independent tokens, a token of
    relevance 0 adds nothing, and less than 1e-6 counts as rounding error. Without ties, the choice is equivariant to
    permutations of the tokens.

    Departure: in the paper, relevance is the similarity of CLIP's image tokens to its text tower's embedding of the
    question. The models here come without a text tower; :func:`question_relevance`, the embedding cosine in the
    language model's input space, replaces it. On models with tiles, the published code keeps k tokens of each tile,
    scales relevance over all tiles together, and leaves newline tokens out of the budget; here k counts all tokens of
    an image, including newlines.

    Args:
        sign: 1 prefers tokens that fit the question; -1, which the official code uses with CLIP's embeddings, prefers
            tokens that do not.

    Source: Zhang et al., "Beyond attention or similarity: maximizing conditional diversity for token pruning in MLLMs",
    NeurIPS 2025; greedy MAP: Chen, Zhang and Zhou, "Fast greedy MAP inference for determinantal point process", 2018.
    """

    def __init__(self, sign: Literal[1, -1] = 1) -> None:
        if sign not in (1, -1):
            raise ValueError(f"sign must be 1 or -1; got {sign!r}")
        self.sign = sign

    def __call__(
        self, vlm: FrozenVLM, encoded: Encoded, counts: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Choose tokens; see :class:`agents.base.Selector`."""
        mask = encoded.token_mask
        counts = torch.minimum(counts, mask.sum(1))
        relevance = question_relevance(encoded, self.sign)  # (B, N)
        kernel = relevance[:, :, None] * cosine(encoded.tokens, encoded.tokens) * relevance[:, None]
        batch = torch.arange(len(encoded), device=mask.device)
        steps = int(counts.max())
        volume = kernel.diagonal(dim1=1, dim2=2).clone()  # what each token would add, squared, (B, N)
        factors = kernel.new_zeros(len(encoded), steps, mask.shape[1])  # rows of the Cholesky factor
        chosen = torch.zeros_like(mask)
        for step in range(steps):
            score = torch.where(volume > NO_VOLUME, volume, relevance - 2).round(decimals=9)
            pick = score.masked_fill(chosen | ~mask, -torch.inf).argmax(1)  # (B,)
            going_on = step < counts
            chosen[batch[going_on], pick[going_on]] = True
            own = volume[batch, pick][:, None]
            earlier = factors[:, :step]
            shared = (earlier * earlier[batch, :, pick][..., None]).sum(1)  # (B, N)
            row = (kernel[batch, pick] - shared) / own.clamp_min(NO_VOLUME).sqrt()
            factors[:, step] = row.where(own > NO_VOLUME, 0)
            volume = volume - factors[:, step].square()
        return chosen
