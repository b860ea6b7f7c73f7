"""What differs between model families: where the visual tokens come from, and where they are in the image."""

from __future__ import annotations

from typing import Any, Protocol

import torch

__all__ = ["FAMILIES", "Family", "LlavaFamily"]


class Family(Protocol):
    """What the adapter must know of a model family."""

    def image_token_id(self, config: Any) -> int:
        """Return the id that stands for a visual token in ``input_ids``."""
        ...

    def features(self, model: Any, pixels: dict[str, torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return, for each image, its projected tokens (N, D) and their centres (N, 2) in [0, 1]."""
        ...

    def cls_attention(self, model: Any, pixels: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Return, for each image, the attention its tokens get from the CLS token (N,)."""
        ...


class LlavaFamily:
    """LLaVA 1.5 and alike: one image, one grid of patches, tokens in raster order."""

    def image_token_id(self, config: Any) -> int:
        """Return the placeholder's id."""
        return int(config.image_token_id)

    def features(self, model: Any, pixels: dict[str, torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return projected tokens and their centres."""
        output = model.model.get_image_features(pixel_values=pixels["pixel_values"].to(model.dtype), return_dict=True)
        patch = model.config.vision_config.patch_size
        height, width = (size // patch for size in pixels["pixel_values"].shape[-2:])
        tokens = list(output.pooler_output)
        if len(tokens[0]) != height * width:
            raise ValueError(
                f"expected {height} x {width} visual tokens, the model gives {len(tokens[0])}: "
                "only vision_feature_select_strategy='default' (no CLS token among the features) is supported"
            )
        rows = (torch.arange(height, device=tokens[0].device) + 0.5) / height
        columns = (torch.arange(width, device=tokens[0].device) + 0.5) / width
        centres = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)
        return tokens, [centres] * len(tokens)

    def cls_attention(self, model: Any, pixels: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Return CLS-to-patch attention at the layer whose output is selected, averaged over heads."""
        tower = model.model.vision_tower
        layer = model.config.vision_feature_layer
        if not isinstance(layer, int):
            raise NotImplementedError("CLS attention needs a single vision_feature_layer, this model mixes several")
        before = tower.config._attn_implementation
        tower.set_attn_implementation("eager")  # the fused kernels return no attention
        try:
            output = tower(pixels["pixel_values"].to(model.dtype), output_attentions=True, return_dict=True)
        finally:
            tower.set_attn_implementation(before)
        # hidden_states[i] is the output of layer i - 1, as hidden_states[0] is the embedding
        index = layer if layer < 0 else layer - 1
        return list(output.attentions[index].mean(1)[:, 0, 1:].float())


FAMILIES: dict[str, type[Family]] = {"llava": LlavaFamily}
"""Families by ``config.model_type``."""
