"""What the vision tower computes on the way to its features: attention and keys, for methods that prune by them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from grip_env.tasks.base import Example

__all__ = [
    "TowerView",
    "attention_of_layer",
    "clip_views",
    "known_images",
    "layer_index",
    "qwen_received_attention",
]


@dataclass
class TowerView:
    """What the selected layer of a CLIP vision tower made of one image; the CLS token comes first."""

    attention: torch.Tensor
    """What each of the N patches gets from the CLS token, averaged over heads, float (N,)."""
    features: torch.Tensor
    """The layer's output, which goes into the projector, float (1 + N, W)."""
    keys: torch.Tensor
    """The layer's keys, averaged over heads, float (1 + N, W / heads)."""


def layer_index(feature_layer: Any) -> int:
    """Return which of the tower's layers, counted from its end, gives the features of ``vision_feature_layer``.

    Hidden state i + 1 comes out of layer i; counted from the end, both have the same number.

    Raises:
        NotImplementedError: If several layers are mixed, or the features come before the first.
    """
    if not isinstance(feature_layer, int) or feature_layer == 0:
        raise NotImplementedError(
            f"the tower's attention needs a single vision_feature_layer, this model has {feature_layer!r}"
        )
    return feature_layer if feature_layer < 0 else feature_layer - 1


@contextmanager
def _eager(tower: Any) -> Iterator[None]:
    """In this context the tower's attention can be read: the fused kernels return none."""
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        yield
    finally:
        tower.set_attn_implementation(before)


def attention_of_layer(tower: Any, pixels: torch.Tensor, layer: int) -> torch.Tensor:
    """Return the attention weights of one layer of a CLIP or SigLIP tower, float (B, heads, queries, keys).

    Args:
        tower: The vision tower; its attention implementation is the same afterwards.
        pixels: (B, 3, height, width).
        layer: Which layer, an index of a list.
    """
    with _eager(tower):
        output = tower(pixels, output_attentions=True, return_dict=True)
    weights: torch.Tensor = output.attentions[layer]
    return weights


def clip_views(tower: Any, pixels: torch.Tensor, feature_layer: int) -> list[TowerView]:
    """Run a CLIP tower on images (B, 3, height, width) and look at the layer its features come from.

    Raises:
        NotImplementedError: If they come from several.
    """
    layer = layer_index(feature_layer)
    with _eager(tower):
        output = tower(pixels, output_attentions=True, output_hidden_states=True, return_dict=True)
    block = tower.encoder.layers[layer]
    heads = tower.config.num_attention_heads
    read = output.hidden_states[layer - 1 if layer < 0 else layer]  # what the layer reads
    keys = block.self_attn.k_proj(block.layer_norm1(read)).unflatten(-1, (heads, -1)).mean(2)  # (B, 1 + N, W / heads)
    attention = output.attentions[layer].mean(1)[:, 0, 1:]
    return [TowerView(*parts) for parts in zip(attention, output.hidden_states[feature_layer], keys, strict=True)]


def qwen_received_attention(model: Any, pixels: torch.Tensor, grids: torch.Tensor) -> list[torch.Tensor]:
    """Return what the patches of each token get in the last layer of a Qwen-VL tower, pooled as its merger pools them.

    That is the mean over heads, over all patches of the image as queries, and over the merge x merge patches of the
    token. Qwen-VL's layers return no attention, whatever the kernel: queries and keys are computed once more from what
    the layer reads. Where the last layer attends within windows, attention across windows counts as 0.

    Args:
        model: The part of the model that has ``get_image_features`` and ``visual``.
        pixels: Patches of all images, as the image processor gives them.
        grids: Frames, rows and columns of patches of each image, long (B, 3).

    Returns:
        float (N,) for each image.
    """
    visual = model.visual
    layer = visual.blocks[-1].attn
    unit = visual.spatial_merge_size**2
    scores: list[torch.Tensor] = []

    def read(module: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden = positional[0]  # (P, W), the patches of all images in the order of the layers
        queries, keys, _ = module.qkv(hidden).reshape(len(hidden), 3, module.num_heads, -1).unbind(1)
        rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb_vision
        queries, keys = rotate(queries, keys, *named["position_embeddings"])  # (P, heads, W / heads)
        bounds = named["cu_seqlens"].tolist()
        for start, stop in pairwise(bounds):
            q, k = (part[start:stop].transpose(0, 1).float() for part in (queries, keys))
            weights = (q @ k.mT * module.scaling).softmax(-1)  # (heads, n, n)
            scores.append(weights.mean(0).sum(0))

    def stand_in(module: Any, positional: tuple[Any, ...], merged: torch.Tensor) -> torch.Tensor:
        # the tower puts tokens back in the order of the image behind its merger, and splits them by image
        return torch.cat(scores).reshape(-1, unit).mean(1, keepdim=True)  # the patches of a token stand together

    hooks = [layer.register_forward_pre_hook(read, with_kwargs=True), visual.merger.register_forward_hook(stand_in)]
    try:
        output = model.get_image_features(pixel_values=pixels, image_grid_thw=grids, return_dict=True)
    finally:
        for hook in hooks:
            hook.remove()
    patches = grids.prod(-1).tolist()
    return [tokens[:, 0] / count for tokens, count in zip(output.pooler_output, patches, strict=True)]


def known_images(examples: Sequence[Example]) -> list[np.ndarray]:
    """Return the images of examples.

    Raises:
        ValueError: If one is not known, as where the batch was made of a processor's tensors.
    """
    images = [example.image for example in examples]
    if any(image.size == 0 for image in images):
        raise ValueError("the vision tower has to run on the images once more, and these are not known")
    return images
