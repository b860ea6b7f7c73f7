"""Training-free ways to choose tokens: the baselines every learnt agent stands beside.

Ties are broken by score, then by index, as the published codes leave it open.
"""

from __future__ import annotations

import math

import torch

from agents.base import Selector, top_k
from grip_env.vlms.base import Encoded, FrozenVLM

__all__ = ["BASELINES", "all_tokens", "cls_attention", "max_min_diversity", "oracle", "random_tokens", "uniform_grid"]


def random_tokens(vlm: FrozenVLM, encoded: Encoded, kept: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Keep uniformly random tokens."""
    luck = torch.rand(encoded.token_mask.shape, generator=generator).to(encoded.tokens.device)
    return top_k(luck, kept, encoded.token_mask)


def uniform_grid(vlm: FrozenVLM, encoded: Encoded, kept: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Keep tokens spread evenly over the image: k lattice points, each taken by the nearest token still free."""
    cache: dict[tuple[int, bytes], torch.Tensor] = {}
    chosen = torch.zeros_like(encoded.token_mask)
    for row, count in enumerate(kept.tolist()):
        real = encoded.token_mask[row]
        places = encoded.positions[row][real]
        key = (count, places.cpu().numpy().tobytes())
        if key not in cache:
            cache[key] = _nearest_free(places, _lattice(count).to(places))
        chosen[row, real.nonzero().flatten()[cache[key]]] = True
    return chosen


def _lattice(count: int) -> torch.Tensor:
    """Return ``count`` points of the unit square in rows as equal as possible, (count, 2)."""
    rows = max(1, round(math.sqrt(count)))
    points = []
    for row in range(rows):
        inside = count * (row + 1) // rows - count * row // rows
        points += [((row + 0.5) / rows, (column + 0.5) / inside) for column in range(inside)]
    return torch.tensor(points)


def _nearest_free(places: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    distance = torch.cdist(targets, places)
    taken: list[int] = []
    for row in distance:
        row = row.clone()
        row[taken] = torch.inf
        taken.append(int(row.argmin()))
    return torch.tensor(taken)


def cls_attention(vlm: FrozenVLM, encoded: Encoded, kept: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Keep the tokens the vision tower's CLS token attends to most.

    Source: Zhang et al., "[CLS] attention is all you need for training-free visual token pruning" (FasterVLM), 2024.
    """
    return top_k(vlm.attention(encoded, "cls"), kept, encoded.token_mask)


def max_min_diversity(vlm: FrozenVLM, encoded: Encoded, kept: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Greedily keep the token farthest, in cosine distance, from its nearest kept one.

    The first pick is the token whose distance to its nearest neighbour is largest.
    Source: Alvar et al., "DivPrune: diversity-based visual token pruning for large multimodal models", CVPR 2025.
    """
    mask = encoded.token_mask
    unit = torch.nn.functional.normalize(encoded.tokens.float(), dim=-1)
    distance = 1 - unit @ unit.transpose(1, 2)  # (B, N, N)
    batch = torch.arange(len(encoded), device=mask.device)
    itself = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    others = distance.masked_fill(itself | ~mask[:, None], torch.inf)
    nearest = others.amin(2)  # (B, N)
    chosen = torch.zeros_like(mask)
    for step in range(int(kept.max())):
        pick = nearest.masked_fill(chosen | ~mask, -torch.inf).argmax(1)  # (B,)
        going_on = step < kept
        chosen[batch[going_on], pick[going_on]] = True
        reached = distance[batch, pick]
        nearest = reached if step == 0 else torch.minimum(nearest, reached)
    return chosen


def oracle(vlm: FrozenVLM, encoded: Encoded, kept: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Keep the ground-truth relevant tokens, best first, and fill up with random ones. Needs labels."""
    relevance = encoded.relevance()
    if relevance is None:
        raise ValueError("the oracle needs examples with ground-truth relevance, as the scenes task gives them")
    luck = torch.rand(encoded.token_mask.shape, generator=generator).to(encoded.tokens.device)
    return top_k(torch.where(relevance > 0, 1 + relevance, luck), kept, encoded.token_mask)


def all_tokens(vlm: FrozenVLM, encoded: Encoded, kept: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Keep everything, whatever the budget: the model without pruning."""
    return encoded.token_mask.clone()


BASELINES: dict[str, Selector] = {
    "random": random_tokens,
    "uniform grid": uniform_grid,
    "CLS attention": cls_attention,
    "max-min diversity": max_min_diversity,
    "oracle": oracle,
}
"""What the report compares with, by the name in its tables; the oracle is given the ground truth."""
