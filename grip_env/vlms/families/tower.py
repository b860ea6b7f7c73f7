"""Attention, features and keys of vision towers, for pruning methods that use them."""

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
    """Values of the selected layer of a CLIP vision tower for one image.

    The CLS token is first.
    """

    attention: torch.Tensor
    """Attention from the CLS token on each of the N patches, averaged over heads, float (N,)."""
    features: torch.Tensor
    """Output of the layer, which is the input of the projector, float (1 + N, W)."""
    keys: torch.Tensor
    """Keys of the layer, averaged over heads, float (1 + N, W / heads)."""


def layer_index(feature_layer: Any) -> int:
    """Return the index of the tower's layer that outputs ``vision_feature_layer``.

    Hidden state i + 1 is the output of layer i; counted from the end, both have the same number.

    Raises:
        NotImplementedError: If several layers are mixed, or the features are the input of the first layer.
    """
    if not isinstance(feature_layer, int) or feature_layer == 0:
        raise NotImplementedError(
            f"the tower's attention needs a single vision_feature_layer, this model has {feature_layer!r}"
        )
    return feature_layer if feature_layer < 0 else feature_layer - 1


@contextmanager
def _eager(tower: Any) -> Iterator[None]:
    """Switch the tower to eager attention, since fused kernels return no attention weights."""
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        yield
    finally:
        tower.set_attn_implementation(before)


def attention_of_layer(tower: Any, pixels: torch.Tensor, layer: int) -> torch.Tensor:
    """Return the attention weights of one layer of a CLIP or SigLIP tower.

    Args:
        tower: The vision tower; its attention implementation is restored afterwards.
        pixels: Images, (B, 3, height, width).
        layer: Index of the layer in the list of layers.

    Returns:
        Attention weights, float (B, heads, queries, keys).
    """
    with _eager(tower):
        output = tower(pixels, output_attentions=True, return_dict=True)
    weights: torch.Tensor = output.attentions[layer]
    return weights


def clip_views(tower: Any, pixels: torch.Tensor, feature_layer: int) -> list[TowerView]:
    """Run a CLIP tower on images (B, 3, height, width) and read the layer of its features.

    Raises:
        NotImplementedError: If the features come from several layers.
    """
    layer = layer_index(feature_layer)
    with _eager(tower):
        output = tower(pixels, output_attentions=True, output_hidden_states=True, return_dict=True)
    block = tower.encoder.layers[layer]
    heads = tower.config.num_attention_heads
    read = output.hidden_states[layer - 1 if layer < 0 else layer]  # the input of the layer
    keys = block.self_attn.k_proj(block.layer_norm1(read)).unflatten(-1, (heads, -1)).mean(2)  # (B, 1 + N, W / heads)
    attention = output.attentions[layer].mean(1)[:, 0, 1:]
    return [TowerView(*parts) for parts in zip(attention, output.hidden_states[feature_layer], keys, strict=True)]


def qwen_received_attention(model: Any, pixels: torch.Tensor, grids: torch.Tensor) -> list[torch.Tensor]:
    """Return the attention that tokens receive in the last layer of a Qwen-VL tower.

    This is the mean over heads, over all patches of the image as queries, and over the merge x merge patches that the
    tower's merger pools to a token. Qwen-VL's layers return no attention, whatever the kernel, so queries and keys are
    recomputed from the input of the layer. If the last layer attends within windows, attention across windows is 0.

    Args:
        model: The part of the model that has ``get_image_features`` and ``visual``.
        pixels: Patches of all images from the image processor.
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
        # after its merger, the tower restores the order of tokens in the image, and splits them by image
        return torch.cat(scores).reshape(-1, unit).mean(1, keepdim=True)  # the patches of a token are adjacent

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
        ValueError: If one is missing, as in a batch made from a processor's tensors.
    """
    images = [example.image for example in examples]
    if any(image.size == 0 for image in images):
        raise ValueError("the vision tower has to run on the images again, and these are not available")
    return images
