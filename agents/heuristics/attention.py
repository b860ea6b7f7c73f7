"""Selectors that rank tokens by the attention of the vision tower."""

from __future__ import annotations

import torch

from agents.base import top_k
from agents.heuristics.diversity import cosine
from grip_env.vlms.base import Encoded, FrozenVLM

__all__ = ["VisPruner", "cls_attention", "received_attention"]


def cls_attention(vlm: FrozenVLM, encoded: Encoded, counts: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Keep the tokens that the vision tower's CLS token attends to most.

    Attention is taken at the layer that the features come from. FasterVLM uses this rule, and so does VisionZip for its
    dominant tokens: the sum and the mean over heads give the same ranking.
    Sources: Zhang et al., "[CLS] attention is all you need for training-free visual token pruning" (FasterVLM), 2024;
    Yang et al., "VisionZip: longer is better but not necessary in vision language models", CVPR 2025.

    Raises:
        NotImplementedError: If the model's tower has no CLS token beside its visual tokens.
    """
    return top_k(vlm.attention(encoded, "cls"), counts, encoded.token_mask)


def received_attention(
    vlm: FrozenVLM, encoded: Encoded, counts: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Keep the tokens that the vision tower's patches attend to most on average.

    For towers without a CLS token.

    Raises:
        NotImplementedError: If the model does not give attention for each visual token.
    """
    return top_k(vlm.attention(encoded, "received"), counts, encoded.token_mask)


class VisPruner:
    """Selector that keeps important tokens and, among the others, removes near-duplicates.

    The first int(k * ratio) places go to the tokens of highest CLS attention. The others are listed by falling
    attention, and rounds remove tokens until the list fits the remaining places. Each round compares the even places of
    the list, counted from 0, with the odd ones, and removes up to ``pace`` tokens: the ones at even places that are
    most similar to a token at an odd place. The next list has the remaining even places first, in the order of falling
    similarity, and then all odd places.

    Among tokens of equal attention, the lower index counts as more important, but the list has the higher index first
    (the published code uses an unstable sort, and its results in the tests have this order). Among equal similarities,
    the earlier place in the list leaves first. Without ties, the choice is equivariant to permutations of the tokens.

    Similarity is the cosine of the tower's features before the projector, as in the paper, if the model gives them for
    each token (a CLIP tower in LLaVA; a block of tokens has their mean). Otherwise, as with ``kind="received"`` on
    towers without CLS, it is the cosine of the tokens behind the projector.

    The published code fails for many k, where an odd number is left to remove or the list is short; here a round then
    removes fewer.

    Args:
        ratio: Share of important tokens among the kept ones, in [0, 1].
        pace: Most tokens to remove in a round.
        kind: Attention that ranks the tokens: "cls", or, as an approximation for towers without CLS, "received".

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
        listing = attention.argsort(dim=1, stable=True).flip(1)  # the same, except for ties
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
        """Return the ``count`` of the listed tokens (n,) that are left when duplicates are removed."""
        if not count:
            return listed[:0]
        while (surplus := len(listed) - count) > 0:
            nearest = similarity[listed[::2]][:, listed[1::2]].amax(1)  # of the tokens at even places
            order = nearest.argsort(descending=True, stable=True)
            listed = torch.cat([listed[::2][order[min(self.pace, surplus) :]], listed[1::2]])
        return listed


def _compared(vlm: FrozenVLM, encoded: Encoded) -> torch.Tensor:
    """Return the features that similarity is measured on, float (B, N, W).

    They are the tower's features before the projector if the model gives them, otherwise the tokens behind it.
    """
    before = getattr(vlm, "tower_features", None)
    if before is None:
        return encoded.tokens
    try:
        features: torch.Tensor = before(encoded)
    except NotImplementedError:
        return encoded.tokens
    return features
