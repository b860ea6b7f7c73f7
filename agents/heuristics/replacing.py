"""Methods that replace visual tokens instead of selecting them: merging and down-sampling.

Their result is not a selection of the tokens that an environment shows, so it is reported separately from selectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch.nn.functional import normalize

from grip_env.vlms.base import Encoded, FrozenVLM
from grip_env.vlms.families.tower import TowerView, known_images

if TYPE_CHECKING:
    from grip_env.vlms.families.base import Picture
    from grip_env.vlms.huggingface import HuggingFaceVLM

__all__ = ["Replacement", "Replacer", "VisionZip", "downsampled_image"]


@dataclass(frozen=True)
class Replacement:
    """The same questions with fewer, new visual tokens.

    Score it with ``vlm.score(replacement.encoded, replacement.selection[:, None])``.
    """

    encoded: Encoded
    """B examples with the new tokens, float (B, K, D)."""
    selection: torch.Tensor
    """Mask of the new tokens, bool (B, K); ``selection.sum(1)`` tokens are used, no more than asked for.

    ``Scores.kept`` is a share of these tokens, not of the replaced ones."""


@runtime_checkable
class Replacer(Protocol):
    """Interface of methods that replace the tokens of a batch of examples by fewer ones."""

    def __call__(
        self, vlm: FrozenVLM, encoded: Encoded, counts: torch.Tensor, generator: torch.Generator
    ) -> Replacement:
        """Return the examples with no more tokens than are asked for.

        Args:
            vlm: The model the examples were encoded with.
            encoded: B examples, whose images are known.
            counts: Maximum number of tokens for each example, from 1 to all, long (B,).
            generator: Source of any randomness, on the CPU.

        Raises:
            NotImplementedError: If the model does not support this method.
            ValueError: If an image is not known, or a count is out of range.
        """
        ...


class VisionZip:
    """Replacer that keeps the tokens of highest CLS attention and merges the others.

    Of k tokens, c = round(k * merged) are merged and d = k - c are dominant: the CLS token itself and the d - 1 patches
    it attends to most, in the order of their indices (ties go to the lower one). The other R patches are compared by
    their keys, averaged over heads. The patches at 0, s, 2s, ... with s = max(1, R // c) are the c targets. Every other
    patch is assigned to the target of highest cosine (the first one among ties), and a merged token is its target plus
    the mean of the patches assigned to it. Merging acts on the tower's features, before the projector. The order of the
    new tokens in the prompt is CLS, dominant, merged. A budget of one token gives the CLS token alone, and even a
    budget of all tokens differs from the model without pruning.

    Departure: the vlm's position policy decides whether new tokens keep the positions of their source patches
    ("original"; the CLS token has the position of the first patch, a merged one that of its target) or are renumbered
    ("reindex", as in the paper's code). Their positions in the image are used for pictures only.

    Args:
        merged: Share of merged tokens, in [0, 1). The paper merges 10 of 64.

    Source: Yang et al., "VisionZip: longer is better but not necessary in vision language models", CVPR 2025.
    """

    def __init__(self, merged: float = 10 / 64) -> None:
        if not 0 <= merged < 1:
            raise ValueError(f"merged must be in [0, 1); got {merged}")
        self.merged = merged

    @torch.no_grad()
    def __call__(
        self, vlm: FrozenVLM, encoded: Encoded, counts: torch.Tensor, generator: torch.Generator
    ) -> Replacement:
        """Return the examples with exactly ``counts`` tokens each; see :class:`Replacer`."""
        model = _adapter(vlm, "VisionZip")
        sizes = _checked(encoded, counts)
        views = model.family.views(known_images(encoded.examples))
        pictures, origins = [], []
        for row, (view, count) in enumerate(zip(views, sizes, strict=True)):
            features, origin = self._merge(view, count)
            positions = encoded.positions[row, origin].clone()
            positions[0] = 0.5  # the CLS token shows the whole image
            pictures.append(_picture(model.family.project(features), positions))
            origins.append(origin)
        return _replace(model, encoded, pictures, origins)

    def _merge(self, view: TowerView, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the features (count, W) of the new tokens and their source patches (count,)."""
        targets = min(round(count * self.merged), count - 1)
        order = view.attention.argsort(descending=True, stable=True)
        split = count - targets - 1
        dominant, rest = order[:split].sort().values, order[split:].sort().values
        features = [view.features[:1], view.features[1 + dominant]]
        origin = [rest[:0].new_zeros(1), dominant]
        if targets:
            keys = normalize(view.keys[1 + rest].double(), dim=-1)
            place = torch.arange(targets, device=rest.device) * max(1, len(rest) // targets)
            other = torch.ones_like(rest, dtype=torch.bool)
            other[place] = False
            nearest = (keys[other] @ keys[place].T).round(decimals=9).argmax(1)  # (R - c,)
            sums = view.features.new_zeros(targets, view.features.shape[1])
            sums = sums.index_add(0, nearest, view.features[1 + rest[other]])
            shares = nearest.bincount(minlength=targets).clamp_min(1)
            features.append(view.features[1 + rest[place]] + sums / shares[:, None].to(sums.dtype))
            origin.append(rest[place])
        return torch.cat(features), torch.cat(origin)


@torch.no_grad()
def downsampled_image(
    vlm: FrozenVLM, encoded: Encoded, counts: torch.Tensor, generator: torch.Generator
) -> Replacement:
    """Encode the image again, down-sampled so that it gives at most ``counts`` tokens.

    The tokens form a grid (:func:`grip_env.vlms.families.base.grid_within`), so often fewer than ``counts`` are used;
    the selection has the number. Towers for images of one size (CLIP, SigLIP) interpolate their position embeddings.
    The prompt is shorter by the tokens saved, and it has the positions of a prompt of this length.

    Raises:
        NotImplementedError: If tiles or pooling decide the number of tokens, or the model is not a HuggingFaceVLM.
        ValueError: If an image is not known, or a count is out of range.
    """
    model = _adapter(vlm, "a down-sampled image")
    sizes = _checked(encoded, counts)
    return _replace(model, encoded, model.family.shrunk(known_images(encoded.examples), sizes))


def _adapter(vlm: FrozenVLM, method: str) -> HuggingFaceVLM:
    from grip_env.vlms.huggingface import HuggingFaceVLM

    if not isinstance(vlm, HuggingFaceVLM):
        raise NotImplementedError(
            f"{method} makes new tokens, which takes a HuggingFaceVLM; got a {type(vlm).__name__}: leave it out"
        )
    return vlm


def _checked(encoded: Encoded, counts: torch.Tensor) -> list[int]:
    real = encoded.token_mask.sum(1)
    if bool((counts < 1).any()) or bool((counts > real).any()):
        raise ValueError(
            f"cannot make {counts.tolist()} tokens of images with {real.tolist()}: ask for 1 to all of each image's"
        )
    sizes: list[int] = counts.tolist()
    return sizes


def _picture(tokens: torch.Tensor, positions: torch.Tensor) -> Picture:
    from grip_env.vlms.families.base import Picture

    return Picture(tokens, positions, "", [len(tokens)])  # the prompt already has the text around it


def _replace(
    vlm: HuggingFaceVLM, encoded: Encoded, pictures: Sequence[Picture], origins: Sequence[torch.Tensor] | None = None
) -> Replacement:
    """Return the examples with other pictures in their prompts.

    Each prompt must hold its image as one run of tokens.

    Args:
        vlm: The model.
        encoded: B examples.
        pictures: One for each example.
        origins: Index of the old token whose position each new token takes, long (K,) for each example; without it,
            positions are the ones of a shorter prompt.
    """
    image = vlm.family.image_token_id
    ids, position_ids = [], []
    for row, picture in enumerate(pictures):
        old = encoded.input_ids[row, : int(encoded.lengths[row])]
        visual = (old == image).nonzero().flatten()
        before, after = old[: visual[0]], old[visual[-1] + 1 :]
        ids.append(torch.cat([before, old.new_full((len(picture.tokens),), image), after]))
        if origins is not None and encoded.position_ids is not None:
            place = encoded.position_ids[row, : len(old)]
            position_ids.append(torch.cat([place[: visual[0]], place[visual[origins[row]]], place[visual[-1] + 1 :]]))
    questions = [words[mask] for words, mask in zip(encoded.question, encoded.question_mask, strict=True)]
    new = vlm.assemble(encoded.examples, pictures, ids, encoded.answer_lengths.tolist(), questions)
    if position_ids:
        new.position_ids = torch.nn.utils.rnn.pad_sequence(position_ids, batch_first=True)
    return Replacement(new, new.token_mask.clone())
