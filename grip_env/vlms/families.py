"""What differs between model families: what stands for an image in the prompt, and where its tokens are in the image.

Each family is a few methods; everything else is in :mod:`grip_env.vlms.huggingface`. The tokens themselves always come
from the model's own ``get_image_features``, so that feature layers, tiling and merging are never rebuilt here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.modeling_outputs import BaseModelOutputWithPooling

from grip_env.vlms.shrinking import grid_within, shrink
from grip_env.vlms.tower import TowerView, attention_of_layer, clip_views, layer_index, qwen_received_attention

__all__ = ["FAMILIES", "Family", "Picture", "family_of"]


@dataclass
class Picture:
    """One image after the vision encoder."""

    tokens: torch.Tensor
    """Visual tokens as the language model gets them, (N, D)."""
    positions: torch.Tensor
    """Row and column of each token's centre in the image, in [0, 1], (N, 2)."""
    text: str
    """What stands for the image in the prompt, with one image token for each run of visual tokens."""
    runs: list[int]
    """How many visual tokens each of these image tokens stands for; they sum to N."""
    deepstack: torch.Tensor | None = None
    """What is added to the tokens after each of the first E layers of the language model, (N, E, D)."""
    grid: torch.Tensor | None = None
    """Frames, rows and columns of patches, (3,), where positions in the text have three axes."""
    cells: torch.Tensor | None = None
    """Height and width of what each token shows, as shares of the image, (N, 2), where tokens differ in it."""


class Family:
    """LLaVA 1.5 and alike: a square of each image, one grid of tokens in raster order.

    Args:
        model: A model of transformers.
        processor: Its tokenizer, image processor and chat template, as attributes of these names.
    """

    stacked = False
    """Whether the model wants visual tokens as one tensor (1, K, D) instead of a list of (K, D)."""
    axes = 1
    """How many numbers say where a token is in the text."""
    first_place = 0
    """The place of the first token in the text."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.tokenizer = processor.tokenizer
        self.image_token_id = int(model.config.image_token_id)
        self.image_token: str = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        self.check()

    def check(self) -> None:
        """Raise ValueError if this model cannot be served."""
        if getattr(self.processor, "chat_template", None) is None:
            raise ValueError("the processor has no chat template: set processor.chat_template to the model's own")

    # -- text --------------------------------------------------------------------------------------------

    @property
    def marker(self) -> str:
        """What the chat template writes for an image."""
        return self.image_token

    def prompt(self, question: str) -> str:
        """Return the text that asks ``question`` about an image, up to where the answer starts."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return str(
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=self.processor.chat_template,
                add_generation_prompt=True,
                tokenize=False,
            )
        )

    def places(self, ids: torch.Tensor, picture: Picture) -> torch.Tensor:
        """Return where each of the ids of one whole sequence (L,) is in the text, long (L,) or (L, axes)."""
        return torch.arange(len(ids), device=ids.device) + self.first_place

    def adds_special_tokens(self, prompt: str) -> bool:
        """Tell whether the tokenizer must add its special tokens: a prompt may already begin with them."""
        return self.tokenizer.bos_token is None or not prompt.startswith(self.tokenizer.bos_token)

    def token_types(self, ids: torch.Tensor, answer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what else the model must be told of each id.

        Args:
            ids: long (R, L).
            answer: Which of them belong to the answer or come after it, bool (R, L).
        """
        return {}

    # -- images ------------------------------------------------------------------------------------------

    def outputs(self, tokens: torch.Tensor, deepstack: torch.Tensor | None) -> Any:
        """Wrap visual tokens (K, D) of all rows of a batch, in order, as the model's encoder does."""
        pooled: Any = tokens[None] if self.stacked else [tokens]
        return BaseModelOutputWithPooling(pooler_output=pooled)

    def pictures(self, images: Sequence[np.ndarray]) -> list[Picture]:
        """Run the vision encoder on images, uint8 (height, width, 3) each."""
        return self.see(self.pixels(images), [image.shape[:2] for image in images])

    def see(self, pixels: dict[str, Any], sizes: Sequence[tuple[int, ...]] | None = None) -> list[Picture]:
        """Run the vision encoder on what the image processor made of images.

        Args:
            pixels: See :meth:`pixels`; "interpolate_pos_encoding" where they are of another size than the tower's.
            sizes: Height and width of each image; ``None`` if they are not known: places are then those in the part
                of the image that the encoder sees.
        """
        more = {key: pixels[key] for key in ("interpolate_pos_encoding",) if key in pixels}
        output = self.model.model.get_image_features(pixel_values=self._pixel_values(pixels), return_dict=True, **more)
        if sizes and len(sizes) != len(output.pooler_output):
            raise ValueError(f"{len(output.pooler_output)} images and {len(sizes)} sizes: give one for each")
        found = []
        for row, tokens in enumerate(output.pooler_output):
            rows, columns = self.grid(pixels["pixel_values"].shape[-2:], len(tokens))
            top, left, height, width = self.window(*sizes[row]) if sizes else (0.0, 0.0, 1.0, 1.0)
            centres = _centres(rows, columns, tokens.device)
            centres = centres * centres.new_tensor([height, width]) + centres.new_tensor([top, left])
            found.append(Picture(tokens, centres.clamp(0, 1), self.text(), [len(tokens)]))
        return found

    def pixels(self, images: Sequence[np.ndarray]) -> dict[str, Any]:
        """Return what the image processor makes of images."""
        return dict(self.processor.image_processor(images=list(images), return_tensors="pt").to(self.model.device))

    def complete(self, pixels: dict[str, Any], ids: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Add to what the family's own processor made of images what only :meth:`pixels` tells.

        Args:
            pixels: Tensors of the processor that are about images.
            ids: The prompts it made, long (L,) each, one for each image.
        """
        return pixels

    def count_images(self, ids: torch.Tensor) -> int:
        """Return how many images a prompt shows, long (L,): runs of image tokens."""
        visual = (ids == self.image_token_id).int()
        return int((visual.diff(prepend=visual.new_zeros(1)) > 0).sum())

    def _pixel_values(self, pixels: dict[str, Any]) -> torch.Tensor:
        values: torch.Tensor = pixels["pixel_values"]
        return values.to(self.model.dtype)

    def text(self) -> str:
        """Return what stands for a picture that is one run of tokens."""
        return self.image_token

    def grid(self, size: Sequence[int], count: int) -> tuple[int, int]:
        """Return rows and columns of the tokens of a picture of ``size`` pixels."""
        patch = self.model.config.vision_config.patch_size
        rows, columns = (side // patch for side in size)
        if rows * columns != count:
            raise ValueError(
                f"expected {rows} x {columns} visual tokens, the model gives {count}: "
                "only vision_feature_select_strategy='default' (no CLS token among the features) is supported"
            )
        return rows, columns

    def window(self, height: int, width: int) -> tuple[float, float, float, float]:
        """Return which part of an image the encoder sees: top, left, height and width, as shares of the image."""
        processor = self.processor.image_processor
        tall, wide = float(height), float(width)
        if getattr(processor, "do_pad", False):  # to a square
            tall = wide = float(max(height, width))
        if getattr(processor, "do_center_crop", False):
            scale = processor.size["shortest_edge"] / min(tall, wide) if "shortest_edge" in processor.size else None
            crop = processor.crop_size
            tall, wide = (crop["height"] / scale, crop["width"] / scale) if scale else (tall, wide)
        return (1 - tall / height) / 2, (1 - wide / width) / 2, tall / height, wide / width

    # -- what pruners ask of the encoder -----------------------------------------------------------------

    def views(self, images: Sequence[np.ndarray]) -> list[TowerView]:
        """Return what the selected layer of the vision tower made of each image, CLS token and all.

        Raises:
            NotImplementedError: If the tower has no CLS token, or its patches are not the visual tokens.
        """
        raise NotImplementedError(f"{self.model.config.model_type} has no CLS attention that fits its visual tokens")

    def received_attention(self, images: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Return, for each image, the attention its tokens get from all patches on average, (N,).

        Raises:
            NotImplementedError: If the tower's attention is not known for each visual token.
        """
        raise NotImplementedError(
            f"{self.model.config.model_type} has no received attention that fits its visual tokens"
        )

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Return what the projector makes of the tower's features (N, W): float (N, D)."""
        projected: torch.Tensor = self.model.model.multi_modal_projector(features[None])
        return projected[0]

    def shrunk(self, images: Sequence[np.ndarray], counts: Sequence[int]) -> list[Picture]:
        """Run the vision encoder on smaller images, that give no more than ``counts[i] >= 1`` tokens each.

        Raises:
            NotImplementedError: If there is no telling how small an image must be for that.
        """
        raise NotImplementedError(
            f"{self.model.config.model_type} has no down-sampled images: tiles or pooling, not the size of the image "
            "alone, decide how many visual tokens it gives"
        )

    def _shrunk_square(self, tower: Any, images: Sequence[np.ndarray], counts: Sequence[int]) -> list[Picture]:
        """Do as :meth:`shrunk` says with towers for images of one size, whose position embeddings are interpolated."""
        if tower.config.model_type not in ("clip_vision_model", "siglip_vision_model"):
            raise NotImplementedError(
                f"{self.model.config.model_type} has no down-sampled images with a {tower.config.model_type}: only the "
                "position embeddings of CLIP and SigLIP are interpolated"
            )
        patch = tower.config.patch_size
        values = self.pixels(images)["pixel_values"]
        whole = [side // patch for side in values.shape[-2:]]
        grids = [grid_within(count, *whole) for count in counts]
        found: list[Picture | None] = [None] * len(images)
        for grid in set(grids):
            rows = [row for row, other in enumerate(grids) if other == grid]
            pixels = {
                "pixel_values": shrink(values[rows], grid[0] * patch, grid[1] * patch),
                "interpolate_pos_encoding": True,
            }
            for row, picture in zip(rows, self.see(pixels, [images[row].shape[:2] for row in rows]), strict=True):
                found[row] = picture
        return [picture for picture in found if picture is not None]


class LlavaFamily(Family):
    """LLaVA 1.5."""

    def views(self, images: Sequence[np.ndarray]) -> list[TowerView]:
        """Look at the layer whose output is selected."""
        tower = self.model.model.vision_tower
        if tower.config.model_type != "clip_vision_model":
            return super().views(images)
        return clip_views(tower, self._pixel_values(self.pixels(images)), self.model.config.vision_feature_layer)

    def received_attention(self, images: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Return the attention at the layer whose output is selected; the CLS token, if any, is among the queries."""
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
    """LLaVA-NeXT and LLaVA-OneVision: the whole image, then its tiles as one grid, a newline token after each row."""

    def see(self, pixels: dict[str, Any], sizes: Sequence[tuple[int, ...]] | None = None) -> list[Picture]:
        """Run the vision encoder on what the image processor made of images."""
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
        """Return row and column of each token, and height and width of what it shows, (N, 2) each."""
        config = self.model.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        whole = _centres(side, side, tokens.device)
        newline = self._newlines(size, side)[side * side :]
        if len(whole) + len(newline) != len(tokens):
            raise ValueError(
                f"expected {side} x {side} visual tokens of the whole image and {len(newline)} of its tiles, the model "
                f"gives {len(tokens)}: its vision_feature_select_strategy does not fit its vision tower"
            )
        cells = torch.full_like(whole, 1 / side)
        rows = int(newline.sum())
        columns = len(newline) // max(1, rows) - 1
        if not columns:  # a single tile is the whole image, and one newline ends it
            return torch.cat([whole, whole.new_ones(1, 2)]), torch.cat([cells, whole.new_zeros(1, 2)])
        shown = whole.new_tensor(self._shown(size, side))  # of the image's height and width, in all rows and columns
        ends = torch.stack([(torch.arange(rows, device=whole.device) + 0.5) / rows, whole.new_ones(rows)], -1)
        tiles = _centres(rows, columns, whole.device).reshape(rows, columns, 2)
        places = torch.cat([tiles, ends[:, None]], 1).reshape(-1, 2)
        places = ((places - 0.5) * shown + 0.5).clamp(0, 1)
        places[newline, 1] = 1.0
        spans = (shown / shown.new_tensor([rows, columns])).repeat(len(newline), 1)
        spans[newline] = 0.0  # a newline shows nothing
        return torch.cat([whole, places]), torch.cat([cells, spans])

    def _shown(self, size: torch.Tensor, side: int) -> tuple[float, float]:
        """Return the shares of the image's height and width that lie in the patches left when padding is cut off.

        Patches are cut off whole and evenly, so that the rims of the image may go with them, or some padding stay.
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
        """Tell which tokens are newlines, bool (N,): the model packs zeros with ones for newlines as it does images."""
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
    """Qwen2-VL, Qwen2.5-VL and Qwen3-VL: a grid as large as the image asks for, positions of three axes."""

    axes = 3

    def see(self, pixels: dict[str, Any], sizes: Sequence[tuple[int, ...]] | None = None) -> list[Picture]:
        """Run the vision encoder on what the image processor made of images."""
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
            centres = _centres(rows, columns, tokens.device)
            found.append(Picture(tokens, centres, self.text(), [len(tokens)], more, grid))
        return found

    def received_attention(self, images: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Return the attention at the last layer, pooled to tokens as its merger pools."""
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
        # they are of the right size already, and the processor would enlarge the smallest
        pixels = self.processor.image_processor(images=small, do_resize=False, return_tensors="pt")
        return self.see(dict(pixels.to(self.model.device)), [image.shape[:2] for image in images])

    def places(self, ids: torch.Tensor, picture: Picture) -> torch.Tensor:
        """Return frame, row and column of visual tokens among the places in the text, long (L, 3)."""
        assert picture.grid is not None
        visual = (ids == self.image_token_id).int()
        places, _ = self.model.model.get_rope_index(
            ids[None], mm_token_type_ids=visual[None], image_grid_thw=picture.grid[None]
        )
        return places[:, 0].T


class Qwen3Family(QwenFamily):
    """Qwen3-VL: the first layers of the language model get features of their own."""

    def outputs(self, tokens: torch.Tensor, deepstack: torch.Tensor | None) -> Any:
        """Wrap visual tokens (K, D) and what is added to them (K, E, D)."""
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        assert deepstack is not None
        layers: Any = [[layer] for layer in deepstack.unbind(1)]
        pooled: Any = [tokens]
        return BaseModelOutputWithDeepstackFeatures(pooler_output=pooled, deepstack_features=layers)


class SplitFamily(Family):
    """Idefics3 and SmolVLM: tiles, each after the name of its place, then the whole image."""

    fake = "<fake_token_around_image>"

    def outputs(self, tokens: torch.Tensor, deepstack: torch.Tensor | None) -> Any:
        """Wrap visual tokens (K, D) as images of one token each, which all versions of transformers take."""
        return BaseModelOutputWithPooling(pooler_output=tokens[:, None])

    def pixels(self, images: Sequence[np.ndarray]) -> dict[str, Any]:
        """Return what the image processor makes of images; each is a sample of its own."""
        nested = [[image] for image in images]
        return dict(
            self.processor.image_processor(images=nested, return_row_col_info=True, return_tensors="pt").to(
                self.model.device
            )
        )

    def see(self, pixels: dict[str, Any], sizes: Sequence[tuple[int, ...]] | None = None) -> list[Picture]:
        """Run the vision encoder on what the image processor made of images."""
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
        if isinstance(pooled, torch.Tensor):  # all tiles (T, n, D), as transformers gave them up to 5.20
            pooled = [part.flatten(0, 1) for part in pooled.split([rows * columns + 1 for rows, columns in grids])]
        found = []
        for tokens, (rows, columns) in zip(pooled, grids, strict=True):
            tiles = rows * columns + 1
            side = _square(len(tokens) / tiles)
            inside = _centres(side, side, tokens.device)
            centres, cells = _tiles(inside, rows, columns)
            text = "".join(
                "".join(f"{self.fake}<row_{r + 1}_col_{c + 1}>{self.image_token}" for c in range(columns)) + "\n"
                for r in range(rows)
            )
            text += "\n" * bool(rows) + f"{self.fake}<global-img>{self.image_token}{self.fake}"
            found.append(Picture(tokens, centres, text, [side * side] * tiles, cells=cells))
        return found

    def count_images(self, ids: torch.Tensor) -> int:
        """Return how many images a prompt shows: each has one view of the whole."""
        return int((ids == self.tokenizer.convert_tokens_to_ids("<global-img>")).sum())

    def complete(self, pixels: dict[str, Any], ids: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Add rows and columns of tiles, as the names of their places tell them."""
        names = [" ".join(self.tokenizer.convert_ids_to_tokens(row.tolist())) for row in ids]
        places = [
            [(0, 0), *((int(r), int(c)) for r, c in re.findall(r"<row_(\d+)_col_(\d+)>", text))] for text in names
        ]
        grids = [max(found) for found in places]  # the last tile is the one of the last row and column
        return pixels | {"rows": [[rows] for rows, _ in grids], "cols": [[columns] for _, columns in grids]}


class InternVLFamily(Family):
    """InternVL: tiles in raster order, then the whole image if there are several."""

    stacked = True

    def pixels(self, images: Sequence[np.ndarray]) -> dict[str, Any]:
        """Return the tiles of all images; the image processor makes them only when it is told to."""
        processor = self.processor.image_processor
        return dict(processor(images=list(images), crop_to_patches=True, return_tensors="pt").to(self.model.device))

    def see(self, pixels: dict[str, Any], sizes: Sequence[tuple[int, ...]] | None = None) -> list[Picture]:
        """Run the vision encoder on what the image processor made of images."""
        output = self.model.model.get_image_features(pixel_values=self._pixel_values(pixels), return_dict=True)
        counts = [int(count) for count in pixels["num_patches"]]
        found = []
        for image, tiles in enumerate(output.pooler_output.split(counts)):
            side = _square(tiles.shape[1])
            rows, columns = self._arrangement(sizes[image] if sizes else None, len(tiles))
            centres, cells = _tiles(_centres(side, side, tiles.device), rows, columns)
            tokens = tiles.flatten(0, 1)
            found.append(Picture(tokens, centres, self.text(), [len(tokens)], cells=cells))
        return found

    def complete(self, pixels: dict[str, Any], ids: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Add the number of tiles of each image, as the length of its run tells it."""
        runs = [int((row == self.image_token_id).sum()) for row in ids]
        return pixels | {"num_patches": [run // self.model.config.image_seq_length for run in runs]}

    def _arrangement(self, size: tuple[int, ...] | None, tiles: int) -> tuple[int, int]:
        """Return rows and columns of the tiles besides the whole image, 0 and 0 if there are none.

        Raises:
            ValueError: If there are others than ``tiles`` in all.
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
        """Return the image token between its marks."""
        return f"<img>{self.image_token}</img>"


class PaliGemmaFamily(Family):
    """PaliGemma: no chat template; image and question see each other whole, the answer only what came before."""

    stacked = True
    first_place = 1

    def check(self) -> None:
        """Accept any model: there is no chat template to miss."""

    def prompt(self, question: str) -> str:
        """Return image, question and the line end after which the answer starts."""
        return f"{self.image_token}{self.tokenizer.bos_token}{question}\n"

    def adds_special_tokens(self, prompt: str) -> bool:
        """Tell that the prompt is complete."""
        return False

    def token_types(self, ids: torch.Tensor, answer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return 0 for what is seen whole and 1 for the rest."""
        return {"token_type_ids": answer.long()}

    def received_attention(self, images: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Return the attention at the last layer."""
        weights = attention_of_layer(self.model.model.vision_tower, self._pixel_values(self.pixels(images)), -1)
        return list(weights.mean((1, 2)))

    def shrunk(self, images: Sequence[np.ndarray], counts: Sequence[int]) -> list[Picture]:
        """Run the vision encoder on smaller images."""
        return self._shrunk_square(self.model.model.vision_tower, images, counts)


class Gemma3Family(Family):
    """Gemma 3: one square image; visual tokens see each other whole."""

    stacked = True

    @property
    def marker(self) -> str:
        """What the chat template writes for an image."""
        return str(self.tokenizer.boi_token)

    def text(self) -> str:
        """Return the image token between its marks."""
        return f"\n\n{self.tokenizer.boi_token}{self.image_token}{self.tokenizer.eoi_token}\n\n"

    def grid(self, size: Sequence[int], count: int) -> tuple[int, int]:
        """Return rows and columns: patches are averaged down to a fixed number of tokens."""
        side = _square(count)
        return side, side

    def received_attention(self, images: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Return the attention at the last layer, averaged over the patches that the projector averages to a token."""
        weights = attention_of_layer(self.model.model.vision_tower, self._pixel_values(self.pixels(images)), -1)
        received = weights.mean((1, 2))  # (B, patches)
        side = _square(received.shape[1])
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
"""The families by ``config.model_type``."""


def family_of(model: Any, processor: Any) -> Family:
    """Return the family a model belongs to.

    Raises:
        ValueError: If there is none, or it cannot serve this model.
    """
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise ValueError(f"model type {kind!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[kind](model, processor)


def _centres(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Return row and column of the cells of a grid in raster order, in [0, 1], (rows * columns, 2)."""
    row = (torch.arange(rows, device=device) + 0.5) / rows
    column = (torch.arange(columns, device=device) + 0.5) / columns
    return torch.stack(torch.meshgrid(row, column, indexing="ij"), -1).flatten(0, 1)


def _tiles(inside: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay out a grid of tiles in raster order, and after it the whole image as one more.

    Args:
        inside: Centres of the n tokens in one tile, a square of them, (n, 2).
        rows: Rows of tiles, 0 if there is only the whole image.
        columns: Columns of tiles.

    Returns:
        Centres in the image, and height and width of what each token shows, both ((rows * columns + 1) * n, 2).
    """
    shape = inside.new_tensor([max(rows, 1), max(columns, 1)])
    centres = [(inside + inside.new_tensor([row, column])) / shape for row in range(rows) for column in range(columns)]
    cell = torch.full_like(inside, len(inside) ** -0.5)
    return torch.cat([*centres, inside]), torch.cat([*(cell / shape for _ in centres), cell])


def _square(count: float) -> int:
    """Return the side of a square of ``count`` tokens.

    Raises:
        ValueError: If it is none.
    """
    side = round(count**0.5)
    if side * side != count:
        raise ValueError(f"expected a square of visual tokens, the model gives {count:g}")
    return side
