"""Supported model families, each with the methods that differ from the base class.

They are in one file, since each is easiest to understand by its differences from the others.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.modeling_outputs import BaseModelOutputWithPooling

from grip_env.vlms.families.base import (
    CHANNELS_LAST,
    Family,
    Picture,
    centres_of,
    grid_within,
    lay_out_tiles,
    side_of_square,
)
from grip_env.vlms.families.tower import TowerView, attention_of_layer, clip_views, layer_index, qwen_received_attention

__all__ = ["FAMILIES", "family_of"]


class LlavaFamily(Family):
    """Family of LLaVA 1.5."""

    key = "grip_env.vlms.families.LlavaFamily"

    def views(self, images: Sequence[np.ndarray]) -> list[TowerView]:
        """Return attention and features of the selected layer for each image."""
        tower = self.model.model.vision_tower
        if tower.config.model_type != "clip_vision_model":
            return super().views(images)
        return clip_views(tower, self._pixel_values(self.pixels(images)), self.model.config.vision_feature_layer)

    def received_attention(self, images: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Return the attention at the selected layer; the CLS token, if any, is among the queries."""
        tower = self.model.model.vision_tower
        if tower.config.model_type not in ("clip_vision_model", "siglip_vision_model"):
            return super().received_attention(images)
        layer = layer_index(self.model.config.vision_feature_layer)
        weights = attention_of_layer(tower, self._pixel_values(self.pixels(images)), layer)
        first = int(tower.config.model_type == "clip_vision_model")
        return list(weights.mean((1, 2))[:, first:])

    def shrunk(self, images: Sequence[np.ndarray], counts: Sequence[int]) -> list[Picture]:
        """Run the vision encoder on smaller images."""
        return self._shrunk_square(self.model.model.vision_tower, images, counts)


class TiledLlavaFamily(Family):
    """Family of LLaVA-NeXT and LLaVA-OneVision, with the whole image and a grid of tiles.

    The tokens of the whole image come first, then those of all tiles as one grid, with a newline token after each row.
    """

    key = "grip_env.vlms.families.TiledLlavaFamily"

    def see(self, pixels: dict[str, Any], sizes: Sequence[tuple[int, ...]] | None = None) -> list[Picture]:
        """Run the vision encoder on the outputs of the image processor."""
        known = pixels["image_sizes"]
        output = self.model.model.get_image_features(
            pixel_values=self._pixel_values(pixels), image_sizes=known, return_dict=True
        )
        found = []
        for tokens, size in zip(output.pooler_output, known, strict=True):
            centres, cells = self._layout(tokens, size)
            found.append(Picture(tokens, centres, self.text(), [len(tokens)], cells=cells))
        return found

    def _layout(self, tokens: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the centre of each token, and height and width of its region, (N, 2) each."""
        config = self.model.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        whole = centres_of(side, side, tokens.device)
        newline = self._newlines(size, side)[side * side :]
        if len(whole) + len(newline) != len(tokens):
            raise ValueError(
                f"expected {side} x {side} visual tokens of the whole image and {len(newline)} of its tiles, the model "
                f"gives {len(tokens)}: its vision_feature_select_strategy does not fit its vision tower"
            )
        cells = torch.full_like(whole, 1 / side)
        rows = int(newline.sum())
        if not rows:  # very wide images: cutting off the padding leaves no row of tiles
            return whole, cells
        columns = len(newline) // rows - 1
        if len(newline) == 1:  # a single tile is the whole image, and one newline ends it
            return torch.cat([whole, whole.new_ones(1, 2)]), torch.cat([cells, whole.new_zeros(1, 2)])
        ends = torch.stack([(torch.arange(rows, device=whole.device) + 0.5) / rows, whole.new_ones(rows)], -1)
        if not columns:  # very tall images: no column is left, but the newlines stay
            return torch.cat([whole, ends]), torch.cat([cells, torch.zeros_like(ends)])
        shown = whole.new_tensor(self._shown(size, side))  # shares of height and width
        tiles = centres_of(rows, columns, whole.device).reshape(rows, columns, 2)
        centres = torch.cat([tiles, ends[:, None]], 1).reshape(-1, 2)
        centres = ((centres - 0.5) * shown + 0.5).clamp(0, 1)
        centres[newline, 1] = 1.0
        spans = (shown / shown.new_tensor([rows, columns])).repeat(len(newline), 1)
        spans[newline] = 0.0  # a newline shows nothing
        return torch.cat([whole, centres]), torch.cat([cells, spans])

    def _shown(self, size: torch.Tensor, side: int) -> tuple[float, float]:
        """Return the shares of the image's height and width left after the padding is cut off.

        Whole patches are cut off, equally many on both sides, so the edges of the image may be lost or some padding may
        stay.
        """
        from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

        config = self.model.config
        tall, wide = (
            count * side
            for count in get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
        )
        height, width = (int(value) for value in size)
        scale = min(tall / height, wide / width)

        def share(patches: int, content: float) -> float:
            return (patches - 2 * ((patches - int(round(content, 7))) // 2)) / content

        return share(tall, height * scale), share(wide, width * scale)

    def _newlines(self, size: torch.Tensor, side: int) -> torch.Tensor:
        """Return a mask of the newline tokens, bool (N,).

        The model packs features of zeros with newlines of ones here.
        """
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        config = self.model.config
        tiles = image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
        blank = torch.zeros(tiles, side * side, 1, device=size.device)
        options: dict[str, Any] = {"image_newline": torch.ones(1, device=size.device)}
        if config.model_type == "llava_next":
            options["vision_feature_select_strategy"] = config.vision_feature_select_strategy
        else:
            options["vision_aspect_ratio"] = config.vision_aspect_ratio
        packed, _ = self.model.model.pack_image_features([blank], size[None], **options)
        newline: torch.Tensor = packed[0][:, 0] > 0.5
        return newline


class QwenFamily(Family):
    """Family of Qwen2-VL and Qwen2.5-VL, with a grid that depends on the image's size.

    Positions have three axes. It is also the base class for Qwen3-VL.
    """

    key = "grip_env.vlms.families.QwenFamily"
    axes = 3
    largest = 2**28
    """Largest size in the settings of the image processor; sizes are areas here."""

    def see(self, pixels: dict[str, Any], sizes: Sequence[tuple[int, ...]] | None = None) -> list[Picture]:
        """Run the vision encoder on the outputs of the image processor."""
        grids = pixels["image_grid_thw"]
        output = self.model.model.get_image_features(
            pixel_values=self._pixel_values(pixels), image_grid_thw=grids, return_dict=True
        )
        merge = self.model.config.vision_config.spatial_merge_size
        layers = getattr(output, "deepstack_features", None)
        found = []
        for row, (tokens, grid) in enumerate(zip(output.pooler_output, grids, strict=True)):
            rows, columns = (int(side) // merge for side in grid[1:])
            more = torch.stack([layer[row] for layer in layers], 1) if layers else None
            centres = centres_of(rows, columns, tokens.device)
            found.append(Picture(tokens, centres, self.text(), [len(tokens)], more, grid))
        return found

    def received_attention(self, images: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Return the attention at the last layer, pooled to tokens as in the tower's merger."""
        pixels = self.pixels(images)
        return qwen_received_attention(self.model.model, self._pixel_values(pixels), pixels["image_grid_thw"])

    def shrunk(self, images: Sequence[np.ndarray], counts: Sequence[int]) -> list[Picture]:
        """Run the vision encoder on smaller images."""
        config = self.model.config.vision_config
        side = config.patch_size * config.spatial_merge_size
        whole = self.pixels(images)["image_grid_thw"][:, 1:] // config.spatial_merge_size
        small = []
        for image, count, grid in zip(images, counts, whole.tolist(), strict=True):
            rows, columns = grid_within(count, *grid)
            small.append(
                np.asarray(Image.fromarray(image).resize((columns * side, rows * side), Image.Resampling.BICUBIC))
            )
        # they have the right size already, and the processor would enlarge the smallest
        pixels = self.processor.image_processor(images=small, do_resize=False, **CHANNELS_LAST)
        return self.see(dict(pixels.to(self.model.device)), [image.shape[:2] for image in images])

    def position_ids(self, ids: torch.Tensor, picture: Picture) -> torch.Tensor:
        """Return the position ids, with frame, row and column for visual tokens, long (L, 3)."""
        assert picture.grid is not None
        visual = (ids == self.image_token_id).int()
        position_ids, _ = self.model.model.get_rope_index(
            ids[None], mm_token_type_ids=visual[None], image_grid_thw=picture.grid[None]
        )
        return position_ids[:, 0].T


class Qwen3Family(QwenFamily):
    """Family of Qwen3-VL, with additional visual features for the first layers."""

    key = "grip_env.vlms.families.Qwen3Family"

    def outputs(self, tokens: torch.Tensor, deepstack: torch.Tensor | None) -> Any:
        """Wrap visual tokens (K, D) and the features added to them (K, E, D)."""
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        assert deepstack is not None
        layers: Any = [[layer] for layer in deepstack.unbind(1)]
        pooled: Any = [tokens]
        return BaseModelOutputWithDeepstackFeatures(pooler_output=pooled, deepstack_features=layers)


class SplitFamily(Family):
    """Family of Idefics3 and SmolVLM, with named tiles followed by the whole image."""

    key = "grip_env.vlms.families.SplitFamily"
    fake = "<fake_token_around_image>"

    def outputs(self, tokens: torch.Tensor, deepstack: torch.Tensor | None) -> Any:
        """Wrap visual tokens (K, D) as images of one token each.

        All versions of transformers accept this form.
        """
        return BaseModelOutputWithPooling(pooler_output=tokens[:, None])

    def pixels(self, images: Sequence[np.ndarray]) -> dict[str, Any]:
        """Return the outputs of the image processor, with each image as a separate sample."""
        nested = [[image] for image in images]
        return dict(
            self.processor.image_processor(images=nested, return_row_col_info=True, **CHANNELS_LAST).to(
                self.model.device
            )
        )

    def see(self, pixels: dict[str, Any], sizes: Sequence[tuple[int, ...]] | None = None) -> list[Picture]:
        """Run the vision encoder on the outputs of the image processor."""
        output = self.model.model.get_image_features(
            pixel_values=self._pixel_values(pixels),
            pixel_attention_mask=pixels.get("pixel_attention_mask"),
            return_dict=True,
        )
        grids = [
            tuple(int(np.asarray(pixels[key][row]).reshape(-1)[0]) for key in ("rows", "cols"))
            for row in range(len(pixels["pixel_values"]))
        ]
        pooled = output.pooler_output
        if isinstance(pooled, torch.Tensor):  # all tiles (T, n, D), as in transformers up to 5.20
            pooled = [part.flatten(0, 1) for part in pooled.split([rows * columns + 1 for rows, columns in grids])]
        found = []
        for tokens, (rows, columns) in zip(pooled, grids, strict=True):
            tiles = rows * columns + 1
            side = side_of_square(len(tokens) / tiles)
            inside = centres_of(side, side, tokens.device)
            centres, cells = lay_out_tiles(inside, rows, columns)
            text = "".join(
                "".join(f"{self.fake}<row_{r + 1}_col_{c + 1}>{self.image_token}" for c in range(columns)) + "\n"
                for r in range(rows)
            )
            text += "\n" * bool(rows) + f"{self.fake}<global-img>{self.image_token}{self.fake}"
            found.append(Picture(tokens, centres, text, [side * side] * tiles, cells=cells))
        return found

    def count_images(self, ids: torch.Tensor) -> int:
        """Return the number of images in a prompt; each has one global view."""
        return int((ids == self.tokenizer.convert_tokens_to_ids("<global-img>")).sum())

    def complete(self, pixels: dict[str, Any], ids: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Add rows and columns of tiles, read from the names of the tiles in the prompts."""
        names = [" ".join(self.tokenizer.convert_ids_to_tokens(row.tolist())) for row in ids]
        cells = [[(0, 0), *((int(r), int(c)) for r, c in re.findall(r"<row_(\d+)_col_(\d+)>", text))] for text in names]
        grids = [max(found) for found in cells]  # the last tile is in the last row and column
        return pixels | {"rows": [[rows] for rows, _ in grids], "cols": [[columns] for _, columns in grids]}


class InternVLFamily(Family):
    """Family of InternVL, with tiles in raster order.

    If there are several, the whole image follows them.
    """

    key = "grip_env.vlms.families.InternVLFamily"
    stacked = True

    def pixels(self, images: Sequence[np.ndarray]) -> dict[str, Any]:
        """Return the tiles of all images, which the image processor creates only on request."""
        processor = self.processor.image_processor
        return dict(processor(images=list(images), crop_to_patches=True, **CHANNELS_LAST).to(self.model.device))

    def see(self, pixels: dict[str, Any], sizes: Sequence[tuple[int, ...]] | None = None) -> list[Picture]:
        """Run the vision encoder on the outputs of the image processor."""
        output = self.model.model.get_image_features(pixel_values=self._pixel_values(pixels), return_dict=True)
        counts = [int(count) for count in pixels["num_patches"]]
        found = []
        for image, tiles in enumerate(output.pooler_output.split(counts)):
            side = side_of_square(tiles.shape[1])
            rows, columns = self._arrangement(sizes[image] if sizes else None, len(tiles))
            centres, cells = lay_out_tiles(centres_of(side, side, tiles.device), rows, columns)
            tokens = tiles.flatten(0, 1)
            found.append(Picture(tokens, centres, self.text(), [len(tokens)], cells=cells))
        return found

    def complete(self, pixels: dict[str, Any], ids: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Add the number of tiles of each image, from the length of its run of image tokens."""
        runs = [int((row == self.image_token_id).sum()) for row in ids]
        return pixels | {"num_patches": [run // self.model.config.image_seq_length for run in runs]}

    def _arrangement(self, size: tuple[int, ...] | None, tiles: int) -> tuple[int, int]:
        """Return rows and columns of the tiles besides the whole image, 0 and 0 if there are none.

        Raises:
            ValueError: If the size is unknown, or does not lead to ``tiles`` tiles in all.
        """
        if tiles == 1:
            return 0, 0
        if size is None:
            raise ValueError(
                f"InternVL's processor does not tell how the {tiles - 1} tiles of an image lie: give the images' "
                "sizes, as in sizes=[(height, width)]"
            )
        processor = self.processor.image_processor
        choose = sys.modules[type(processor).__module__].get_optimal_tiled_canvas
        tile = (processor.size["height"], processor.size["width"])
        columns, rows = choose(size, tile, processor.min_patches, processor.max_patches)
        if rows * columns + 1 != tiles:
            raise ValueError(
                f"expected {rows} x {columns} tiles and the whole image, the image processor made {tiles}: give the "
                "size of the image it was given"
            )
        return rows, columns

    def text(self) -> str:
        """Return the image token between its start and end tokens."""
        return f"<img>{self.image_token}</img>"


class PaliGemmaFamily(Family):
    """Family of PaliGemma, which has no chat template.

    Attention is full among image and question, and causal for the answer.
    """

    key = "grip_env.vlms.families.PaliGemmaFamily"
    stacked = True
    first_position = 1

    def check(self) -> None:
        """Accept any model, as no chat template is needed."""

    def prompt(self, question: str) -> str:
        """Return the image token, the question and the line end before the answer."""
        return f"{self.image_token}{self.tokenizer.bos_token}{question}\n"

    def adds_special_tokens(self, prompt: str) -> bool:
        """Return False, as the prompt is complete."""
        return False

    def token_types(self, ids: torch.Tensor, answer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return 0 for ids with full attention and 1 for the rest."""
        return {"token_type_ids": answer.long()}

    def received_attention(self, images: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Return the attention at the last layer."""
        weights = attention_of_layer(self.model.model.vision_tower, self._pixel_values(self.pixels(images)), -1)
        return list(weights.mean((1, 2)))

    def shrunk(self, images: Sequence[np.ndarray], counts: Sequence[int]) -> list[Picture]:
        """Run the vision encoder on smaller images."""
        return self._shrunk_square(self.model.model.vision_tower, images, counts)


class Gemma3Family(Family):
    """Family of Gemma 3, with one square image and full attention among visual tokens."""

    key = "grip_env.vlms.families.Gemma3Family"
    stacked = True

    @property
    def marker(self) -> str:
        """Text that the chat template writes for an image."""
        return str(self.tokenizer.boi_token)

    def text(self) -> str:
        """Return the image token between its start and end tokens."""
        return f"\n\n{self.tokenizer.boi_token}{self.image_token}{self.tokenizer.eoi_token}\n\n"

    def grid(self, size: Sequence[int], count: int) -> tuple[int, int]:
        """Return rows and columns of the square of tokens to which patches are averaged."""
        side = side_of_square(count)
        return side, side

    def received_attention(self, images: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Return the attention at the last layer, averaged over the patches of each token."""
        weights = attention_of_layer(self.model.model.vision_tower, self._pixel_values(self.pixels(images)), -1)
        received = weights.mean((1, 2))  # (B, patches)
        side = side_of_square(received.shape[1])
        pooled = self.model.model.multi_modal_projector.avg_pool(received.reshape(-1, 1, side, side))
        return list(pooled.flatten(1))

    def token_types(self, ids: torch.Tensor, answer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return 1 for visual tokens."""
        return {"token_type_ids": (ids == self.image_token_id).long()}


FAMILIES: dict[str, type[Family]] = {
    "llava": LlavaFamily,
    "llava_next": TiledLlavaFamily,
    "llava_onevision": TiledLlavaFamily,
    "qwen2_vl": QwenFamily,
    "qwen2_5_vl": QwenFamily,
    "qwen3_vl": Qwen3Family,
    "smolvlm": SplitFamily,
    "idefics3": SplitFamily,
    "internvl": InternVLFamily,
    "paligemma": PaliGemmaFamily,
    "gemma3": Gemma3Family,
}
"""Families by ``config.model_type``."""


def family_of(model: Any, processor: Any) -> Family:
    """Return the family of a model.

    Raises:
        ValueError: If there is none, or it does not support this model.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(model, torch.nn.Module) or kind is None:
        inside = "give the model itself, its .module" if hasattr(model, "module") else "give the model itself"
        raise ValueError(f"expected an image-text model of transformers, got {type(model).__name__}: {inside}")
    adapted = hasattr(model, "merge_and_unload") or getattr(model, "_hf_peft_config_loaded", False)
    classes = {base for part in model.modules() for base in type(part).__mro__}  # also finds PEFT without its wrapper
    if adapted or any(one.__module__.split(".")[0] == "peft" for one in classes):
        raise ValueError(
            "the model has adapters of PEFT, such as LoRA, that are not merged into its weights: call "
            "merge_and_unload() and give what that returns"
        )
    if kind not in FAMILIES:
        raise ValueError(f"model type {kind!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    if hasattr(model, "_orig_mod"):
        raise ValueError("the model was wrapped by torch.compile: give the model itself, its ._orig_mod")
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        raise ValueError(
            f"{type(model).__name__} has no head that predicts words: load it with AutoModelForImageTextToText"
        )
    devices = sorted({str(weight.device) for weight in model.parameters()})
    if len(devices) > 1 or "meta" in devices:
        raise ValueError(
            f"the weights of a model must be on one device, and are on {' and '.join(devices)}: load it without "
            'device_map, or with one device, as in device_map="cuda:0"'
        )
    for part in ("tokenizer", "image_processor"):
        if not hasattr(processor, part):
            raise ValueError(
                f"expected the model's processor, with tokenizer and image_processor, got {type(processor).__name__}: "
                "load it with AutoProcessor"
            )
    return FAMILIES[kind](model, processor)
