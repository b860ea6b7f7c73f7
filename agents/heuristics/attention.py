"""Keeping tokens that the vision tower itself attends to, alone or with what differs from them."""

from __future__ import annotations

import torch

from agents.base import top_k
from agents.heuristics.diversity import cosine
from grip_env.vlms.base import Encoded, FrozenVLM

__all__ = ["VisPruner", "cls_attention", "received_attention"]


def cls_attention(vlm: FrozenVLM, encoded: Encoded, counts: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Keep the tokens the vision tower's CLS token attends to most, at the layer the features come from.

    The same rule is FasterVLM's and that of VisionZip's dominant tokens: sum and mean over heads rank alike.
    Sources: Zhang et al., "[CLS] attention is all you need for training-free visual token pruning" (FasterVLM), 2024;
    Yang et al., "VisionZip: longer is better but not necessary in vision language models", CVPR 2025.

    Raises:
        NotImplementedError: If the model's tower has no CLS token that stands beside its visual tokens.
    """
    return top_k(vlm.attention(encoded, "cls"), counts, encoded.token_mask)


def received_attention(
    vlm: FrozenVLM, encoded: Encoded, counts: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Keep the tokens that the vision tower's patches attend to most, on average: for towers without a CLS token.

    Raises:
        NotImplementedError: If the model's attention is not known for each visual token.
    """
    return top_k(vlm.attention(encoded, "received"), counts, encoded.token_mask)


class VisPruner:
    """Keeps important tokens, and of the others those that are no duplicates.

    The first int(k * ratio) places go to the tokens of highest CLS attention. The others are listed by falling
    attention, and rounds follow until as many are left as there are places. In each, the (at most ``pace``) tokens at
    even places of the list, counted from 0, that are most similar to one at an odd place leave it. The list is then
    what is left of the even places, in the order of falling similarity, and behind it all of the odd places: the next
    round counts on that. Of equal attentions the lower index is the more important one, but the list has the higher
    index first (the published code leaves it to an unstable sort; so its results in the tests have it); of equal
    similarities, the earlier place in the list leaves first. Without ties, the choice moves with the tokens if they are
    permuted.

    Similarity is the cosine of the tower's features before the projector, as in the paper, where the model gives them
    for each token (a CLIP tower in LLaVA; blocks of it by their mean); elsewhere, as with ``kind="received"`` on towers
    without CLS, it is that of the tokens behind the projector.

    The published code cannot run for many k, where what is left to remove is odd or the list short; here a round then
    removes fewer.

    Args:
        ratio: Share of important tokens among the kept, in [0, 1].
        pace: How many leave in a round at most.
        kind: Which attention ranks the tokens: "cls", or, as an approximation, "received" for towers without CLS.

    Source: Zhang et al., "Beyond text-visual attention: exploiting visual cues for effective token pruning in VLMs"
    (VisPruner), ICCV 2025.
    """

    def __init__(self, ratio: float = 0.5, pace: int = 8, kind: str = "cls") -> None:
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio must be in [0, 1]; got {ratio}")
        if pace < 1:
            raise ValueError(f"pace must be at least 1; got {pace}")
        self.ratio, self.pace, self.kind = ratio, pace, kind

    def __call__(
        self, vlm: FrozenVLM, encoded: Encoded, counts: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Choose tokens; see :class:`agents.base.Selector`.

        Raises:
            NotImplementedError: If the model has no attention of this kind.
        """
        mask = encoded.token_mask
        attention = vlm.attention(encoded, self.kind).masked_fill(~mask, -torch.inf)
        order = attention.argsort(dim=1, descending=True, stable=True)  # (B, N), padding last
        listing = attention.argsort(dim=1, stable=True).flip(1)  # the same, but for the order of equals
        features = _compared(vlm, encoded)
        similarity = cosine(features, features)  # (B, N, N)
        chosen = torch.zeros_like(mask)
        for row, count in enumerate(torch.minimum(counts, mask.sum(1)).tolist()):
            first = int(count * self.ratio)
            chosen[row, order[row, :first]] = True
            listed = listing[row]
            listed = listed[(mask[row] & ~chosen[row])[listed]]
            chosen[row, self._distinct(listed, similarity[row], count - first)] = True
        return chosen

    def _distinct(self, listed: torch.Tensor, similarity: torch.Tensor, count: int) -> torch.Tensor:
        """Return which ``count`` of the listed tokens (n,) are left when duplicates have gone."""
        if not count:
            return listed[:0]
        while (surplus := len(listed) - count) > 0:
            nearest = similarity[listed[::2]][:, listed[1::2]].amax(1)  # of the tokens at even places
            order = nearest.argsort(descending=True, stable=True)
            listed = torch.cat([listed[::2][order[min(self.pace, surplus) :]], listed[1::2]])
        return listed


def _compared(vlm: FrozenVLM, encoded: Encoded) -> torch.Tensor:
    """Return what duplicates are known by, float (B, N, W): features before the projector, or tokens behind it."""
    before = getattr(vlm, "tower_features", None)
    if before is None:
        return encoded.tokens
    try:
        features: torch.Tensor = before(encoded)
    except NotImplementedError:
        return encoded.tokens
    return features
