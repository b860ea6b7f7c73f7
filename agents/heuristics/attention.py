"""Keeping tokens that the vision tower itself attends to, alone or with what differs from them."""

from __future__ import annotations

import torch

from agents.base import top_k
from agents.heuristics.diversity import cosine
from grip_env.vlms.base import Encoded, FrozenVLM

__all__ = ["VisPruner", "cls_attention", "received_attention"]


def cls_attention(vlm: FrozenVLM, encoded: Encoded, kept: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Keep the tokens the vision tower's CLS token attends to most, at the layer the features come from.

    The same rule is FasterVLM's and that of VisionZip's dominant tokens: sum and mean over heads rank alike.
    Sources: Zhang et al., "[CLS] attention is all you need for training-free visual token pruning" (FasterVLM), 2024;
    Yang et al., "VisionZip: longer is better but not necessary in vision language models", CVPR 2025.

    Raises:
        NotImplementedError: If the model's tower has no CLS token that stands beside its visual tokens.
    """
    return top_k(vlm.attention(encoded, "cls"), kept, encoded.token_mask)


def received_attention(
    vlm: FrozenVLM, encoded: Encoded, kept: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Keep the tokens that the vision tower's patches attend to most, on average: for towers without a CLS token.

    Raises:
        NotImplementedError: If the model's attention is not known for each visual token.
    """
    return top_k(vlm.attention(encoded, "received"), kept, encoded.token_mask)


class VisPruner:
    """Keeps important tokens, and of the others those that are no duplicates.

    The first int(k * ratio) places go to the tokens of highest CLS attention. The others are listed by falling
    attention, and in each round the (at most ``pace``) tokens at even places of the list which are most similar to one
    at an odd place leave it, until as many are left as there are places. Ties go to the lower index in the first
    step and to the earlier place in the list in the second. What is at an even place depends on all attentions, but
    not on the order of the tokens: without ties, the choice moves with the tokens if they are permuted.

    Departure: similarity is the cosine of the tokens as the language model gets them, behind the projector; the paper
    compares the tower's features before it.

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
        self, vlm: FrozenVLM, encoded: Encoded, kept: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Choose tokens; see :class:`agents.base.Selector`.

        Raises:
            NotImplementedError: If the model has no attention of this kind.
        """
        mask = encoded.token_mask
        attention = vlm.attention(encoded, self.kind).masked_fill(~mask, -torch.inf)
        order = attention.argsort(dim=1, descending=True, stable=True)  # (B, N), padding last
        similarity = cosine(encoded.tokens, encoded.tokens)  # (B, N, N)
        chosen = torch.zeros_like(mask)
        counts = mask.sum(1)
        for row, count in enumerate(torch.minimum(kept, counts).tolist()):
            ranked = order[row, : int(counts[row])]
            first = int(count * self.ratio)
            chosen[row, ranked[:first]] = True
            chosen[row, self._distinct(ranked[first:], similarity[row], count - first)] = True
        return chosen

    def _distinct(self, listed: torch.Tensor, similarity: torch.Tensor, count: int) -> torch.Tensor:
        """Return which ``count`` of the listed tokens (n,) are left when duplicates have gone."""
        if not count:
            return listed[:0]
        while (surplus := len(listed) - count) > 0:
            nearest = similarity[listed[::2]][:, listed[1::2]].amax(1)  # of the tokens at even places
            order = nearest.argsort(descending=True, stable=True)[: min(self.pace, surplus)]
            stays = torch.ones_like(listed, dtype=torch.bool)
            stays[2 * order] = False
            listed = listed[stays]
        return listed
