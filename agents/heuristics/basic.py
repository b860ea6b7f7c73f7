"""Simple selectors: random, uniform grid, feature norm, ground truth and all tokens."""

from __future__ import annotations

import math

import torch

from agents.base import top_k
from grip_env.vlms.base import Encoded, FrozenVLM

__all__ = ["all_tokens", "feature_norm", "oracle", "random_tokens", "uniform_grid"]


def random_tokens(vlm: FrozenVLM, encoded: Encoded, counts: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Keep uniformly random tokens."""
    luck = torch.rand(encoded.token_mask.shape, generator=generator).to(encoded.tokens.device)
    return top_k(luck, counts, encoded.token_mask)


def uniform_grid(vlm: FrozenVLM, encoded: Encoded, counts: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Keep tokens spread evenly over the image.

    Each of k lattice points takes the nearest free token; ties go to the lower index. Only the positions of the tokens
    matter, so without ties the choice is equivariant to permutations of the tokens.
    """
    cache: dict[tuple[int, bytes], torch.Tensor] = {}
    chosen = torch.zeros_like(encoded.token_mask)
    limits = torch.minimum(counts, encoded.token_mask.sum(1))
    for row, count in enumerate(limits.tolist()):
        if not count:
            continue
        real = encoded.token_mask[row]
        positions = encoded.positions[row][real]
        key = (count, positions.cpu().numpy().tobytes())
        if key not in cache:
            cache[key] = _nearest_free(positions.cpu().double(), _lattice(count)).to(positions.device)
        chosen[row, real.nonzero().flatten()[cache[key]]] = True
    return chosen


def _lattice(count: int) -> torch.Tensor:
    """Return ``count`` points of the unit square, in rows of nearly equal length, (count, 2)."""
    rows = max(1, round(math.sqrt(count)))
    points = []
    for row in range(rows):
        inside = count * (row + 1) // rows - count * row // rows
        points += [((row + 0.5) / rows, (column + 0.5) / inside) for column in range(inside)]
    return torch.tensor(points, dtype=torch.float64)


def _nearest_free(positions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    # a lattice point in the middle of four tokens is common: rounding errors must not decide between them
    distance = (targets[:, None] - positions[None]).square().sum(-1).round(decimals=7)
    taken: list[int] = []
    for row in distance:
        row = row.clone()
        row[taken] = torch.inf
        taken.append(int(row.argmin()))
    return torch.tensor(taken)


def feature_norm(vlm: FrozenVLM, encoded: Encoded, counts: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Keep the tokens of largest Euclidean norm behind the projector."""
    return top_k(encoded.tokens.float().norm(dim=-1), counts, encoded.token_mask)


def oracle(vlm: FrozenVLM, encoded: Encoded, counts: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Keep the ground-truth relevant tokens, best first, and fill up with random ones.

    Uses the answer's place in the image.

    Raises:
        ValueError: If an example has no ground truth.
    """
    relevance = encoded.relevance()
    if relevance is None:
        raise ValueError("the oracle needs examples with ground-truth relevance, as the scenes task gives them")
    luck = torch.rand(encoded.token_mask.shape, generator=generator).to(encoded.tokens.device)
    return top_k(torch.where(relevance > 0, 1 + relevance, luck), counts, encoded.token_mask)


def all_tokens(vlm: FrozenVLM, encoded: Encoded, counts: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Keep all tokens, whatever the budget: the model without pruning."""
    return encoded.token_mask.clone()
