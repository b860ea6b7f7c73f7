"""Base class of model families, with image placeholders and the positions of visual tokens.

The tokens themselves always come from the model's own ``get_image_features``, so feature layers, tiling and merging are
never reimplemented here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from grip_env.vlms.chat_templates import render_chat
from grip_env.vlms.families.tower import TowerView

__all__ = [
    "CHANNELS_LAST",
    "Family",
    "Picture",
    "centres_of",
    "grid_within",
    "lay_out_tiles",
    "shrink",
    "side_of_square",
]


def grid_within(count: int, rows: int, columns: int) -> tuple[int, int]:
    """Return rows and columns of the finest grid of at most ``count`` cells for an image.

    The grid minimises the loss of the axis that loses more, then uses as many cells as fit. Neither axis becomes finer
    than in the full image. Ties go to the grid with more columns.

    Args:
        count: Maximum number of cells, at least 1.
        rows: Rows of the full image's grid.
        columns: Columns of the full image's grid.

    Raises:
        ValueError: If ``count`` is below 1.

    >>> [grid_within(count, 12, 12) for count in (1, 7, 14, 72, 144)]
    [(1, 1), (2, 3), (3, 4), (8, 9), (12, 12)]
    """
    if count < 1:
        raise ValueError(f"an image cannot be shrunk to {count} visual tokens: ask for at least 1")
    grids = [(row, min(columns, count // row)) for row in range(1, min(rows, count) + 1)]
    return max(grids, key=lambda grid: (min(grid[0] / rows, grid[1] / columns), grid[0] * grid[1], grid[1]))


def shrink(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize images, float (B, C, H, W), with antialiasing.

    No value leaves the range of its image. Both resizing and the colour normalisation of image processors are linear,
    so their order makes no difference.
    """
    if pixels.shape[-2:] == (height, width):
        return pixels
    small = torch.nn.functional.interpolate(pixels.float(), size=(height, width), mode="bicubic", antialias=True)
    return small.clamp(pixels.amin((1, 2, 3), keepdim=True), pixels.amax((1, 2, 3), keepdim=True)).to(pixels.dtype)


CHANNELS_LAST: dict[str, Any] = {"input_data_format": "channels_last", "return_tensors": "pt"}
"""Options of image processors. Without them, a side of 1, 3 or 4 pixels would be taken for the colour channels."""


@dataclass
class Picture:
    """One image after the vision encoder."""

    tokens: torch.Tensor
    """Visual tokens as the language model gets them, (N, D)."""
    positions: torch.Tensor
    """Row and column of each token's centre in the image, in [0, 1], (N, 2)."""
    text: str
    """Text that represents the image in the prompt, with one image token for each run of visual tokens."""
    runs: list[int]
    """Number of visual tokens for each of these image tokens; the sum is N."""
    deepstack: torch.Tensor | None = None
    """Features added to the tokens after each of the first E layers of the language model, (N, E, D)."""
    grid: torch.Tensor | None = None
    """Frames, rows and columns of patches, (3,), if position ids have three axes."""
    cells: torch.Tensor | None = None
    """Height and width of the region each token shows, as shares of the image, (N, 2), if tokens differ in it."""


class Family:
    """Family of models like LLaVA 1.5, with a square of each image as one grid of tokens.

    The tokens are in raster order.

    Args:
        model: A model of transformers.
        processor: Object with the model's ``tokenizer``, ``image_processor`` and ``chat_template``.
    """

    stacked = False
    """True if the model takes visual tokens as one tensor (1, K, D) instead of a list of (K, D)."""
    axes = 1
    """Number of axes of position ids."""
    first_position = 0
    """Position id of the first token."""
    key: ClassVar[str]
    """Name of the family in keys of caches, which must not change when the class is moved. Each class has its own; a
    class without one is named by its module and name."""
    largest = 2**14
    """Largest size allowed in the settings of an image processor: a side, in pixels."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.tokenizer = processor.tokenizer
        self.image_token_id = int(model.config.image_token_id)
        known = 0 <= self.image_token_id < len(self.tokenizer)
        token = self.tokenizer.convert_ids_to_tokens(self.image_token_id) if known else None
        if not token:
            raise ValueError(
                f"the tokenizer does not know the image token {self.image_token_id}: save both together again"
            )
        self.image_token: str = token
        self.check()

    def check(self) -> None:
        """Raise ValueError if this model is not supported."""
        if getattr(self.processor, "chat_template", None) is None:
            raise ValueError("the processor has no chat template: set processor.chat_template to the model's own")

    # -- text --------------------------------------------------------------------------------------------

    @property
    def marker(self) -> str:
        """Text that the chat template writes for an image."""
        return self.image_token

    def prompt(self, question: str) -> str:
        """Return the prompt that asks ``question`` about an image, up to the start of the answer."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        return render_chat(self.tokenizer, self.processor.chat_template, messages)

    def position_ids(self, ids: torch.Tensor, picture: Picture) -> torch.Tensor:
        """Return the position ids of one full sequence of ids (L,), long (L,) or (L, axes)."""
        return torch.arange(len(ids), device=ids.device) + self.first_position

    def check_position_policy(self, policy: str) -> None:
        """Raise ValueError if positions of kept tokens cannot be treated as ``policy`` says."""
        if policy not in ("original", "reindex"):
            raise ValueError(f"position_policy must be 'original' or 'reindex', not {policy!r}")
        if policy == "reindex" and self.axes > 1:
            raise ValueError(
                f"position_policy 'reindex' has no meaning for {self.model.config.model_type}, whose visual tokens "
                "have rows and columns as positions: use 'original'"
            )

    def adds_special_tokens(self, prompt: str) -> bool:
        """Return whether the tokenizer must add its special tokens.

        It is False if the prompt already begins with them.
        """
        return self.tokenizer.bos_token is None or not prompt.startswith(self.tokenizer.bos_token)

    def token_types(self, ids: torch.Tensor, answer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return further arguments of the model with a value for each id.

        Args:
            ids: Token ids, long (R, L).
            answer: Mask of the ids that belong to the answer or come after it, bool (R, L).
        """
        return {}

    # -- images ------------------------------------------------------------------------------------------

    def check_sizes(self) -> None:
        """Raise ValueError if the image processor's sizes would exhaust memory."""
        for name in ("size", "crop_size"):
            size = getattr(self.processor.image_processor, name, None) or {}
            sides = dict(size).values() if not isinstance(size, int) else [size]
            if any(isinstance(side, int | float) and side > self.largest for side in sides):
                raise ValueError(f"the image processor's {name} is {size}, where {self.largest} is the most")

    def outputs(self, tokens: torch.Tensor, deepstack: torch.Tensor | None) -> Any:
        """Wrap the visual tokens (K, D) of a batch, row after row, as the model's encoder does."""
        pooled: Any = tokens[None] if self.stacked else [tokens]
        return BaseModelOutputWithPooling(pooler_output=pooled)

    def check_text(self, text: str) -> None:
        """Raise ValueError if a question or an answer contains an image placeholder."""
        for marker in (self.marker, self.image_token):
            if marker in text:
                raise ValueError(f"holds {marker!r}, which stands for an image in this model's prompts: remove it")

    def pictures(self, images: Sequence[np.ndarray]) -> list[Picture]:
        """Run the vision encoder on images, uint8 (height, width, 3) each."""
        return self.see(self.pixels(images), [image.shape[:2] for image in images])

    def see(self, pixels: dict[str, Any], sizes: Sequence[tuple[int, ...]] | None = None) -> list[Picture]:
        """Run the vision encoder on the outputs of the image processor.

        Args:
            pixels: See :meth:`pixels`; with "interpolate_pos_encoding" if their size differs from the tower's.
            sizes: Height and width of each image; ``None`` if they are unknown. Positions are then relative to the part
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
            centres = centres_of(rows, columns, tokens.device)
            centres = centres * centres.new_tensor([height, width]) + centres.new_tensor([top, left])
            found.append(Picture(tokens, centres.clamp(0, 1), self.text(), [len(tokens)]))
        return found

    def pixels(self, images: Sequence[np.ndarray]) -> dict[str, Any]:
        """Return the outputs of the image processor for images."""
        return dict(self.processor.image_processor(images=list(images), **CHANNELS_LAST).to(self.model.device))

    def complete(self, pixels: dict[str, Any], ids: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Add entries of :meth:`pixels` that the outputs of the family's own processor lack.

        Args:
            pixels: The processor's tensors for images.
            ids: The prompts from the processor, long (L,) each, one for each image.
        """
        return pixels

    def count_images(self, ids: torch.Tensor) -> int:
        """Return the number of images in a prompt, long (L,): runs of image tokens."""
        visual = (ids == self.image_token_id).int()
        return int((visual.diff(prepend=visual.new_zeros(1)) > 0).sum())

    def _pixel_values(self, pixels: dict[str, Any]) -> torch.Tensor:
        values: torch.Tensor = pixels["pixel_values"]
        return values.to(self.model.dtype)

    def text(self) -> str:
        """Return the text that represents an image of a single run of tokens."""
        return self.image_token

    def grid(self, size: Sequence[int], count: int) -> tuple[int, int]:
        """Return rows and columns of the token grid of an image of ``size`` pixels."""
        patch = self.model.config.vision_config.patch_size
        rows, columns = (side // patch for side in size)
        if rows * columns != count:
            raise ValueError(
                f"expected {rows} x {columns} visual tokens, the model gives {count}: "
                "only vision_feature_select_strategy='default' (no CLS token among the features) is supported"
            )
        return rows, columns

    def window(self, height: int, width: int) -> tuple[float, float, float, float]:
        """Return the part of an image that the encoder sees.

        It is given as top, left, height and width, as shares of the image.
        """
        processor = self.processor.image_processor
        tall, wide = float(height), float(width)
        if getattr(processor, "do_pad", False):  # to a square
            tall = wide = float(max(height, width))
        if getattr(processor, "do_center_crop", False):
            scale = processor.size["shortest_edge"] / min(tall, wide) if "shortest_edge" in processor.size else None
            crop = processor.crop_size
            tall, wide = (crop["height"] / scale, crop["width"] / scale) if scale else (tall, wide)
        return (1 - tall / height) / 2, (1 - wide / width) / 2, tall / height, wide / width

    # -- values for pruners ------------------------------------------------------------------------------

    def views(self, images: Sequence[np.ndarray]) -> list[TowerView]:
        """Return attention and features of the vision tower's selected layer for each image.

        Raises:
            NotImplementedError: If the tower has no CLS token, or its patches are not the visual tokens.
        """
        raise NotImplementedError(f"{self.model.config.model_type} has no CLS attention that fits its visual tokens")

    def received_attention(self, images: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Return, for each image, the average attention from all patches on its tokens, (N,).

        Raises:
            NotImplementedError: If the tower's attention is not available for each visual token.
        """
        raise NotImplementedError(
            f"{self.model.config.model_type} has no received attention that fits its visual tokens"
        )

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Return the projector's output for the tower's features (N, W): float (N, D)."""
        projected: torch.Tensor = self.model.model.multi_modal_projector(features[None])
        return projected[0]

    def shrunk(self, images: Sequence[np.ndarray], counts: Sequence[int]) -> list[Picture]:
        """Run the vision encoder on images shrunk to at most ``counts[i] >= 1`` tokens each.

        Raises:
            NotImplementedError: If the size of an image does not determine its number of tokens.
        """
        raise NotImplementedError(
            f"{self.model.config.model_type} has no down-sampled images: tiles or pooling, not the size of the image "
            "alone, decide how many visual tokens it gives"
        )

    def _shrunk_square(self, tower: Any, images: Sequence[np.ndarray], counts: Sequence[int]) -> list[Picture]:
        """Implement :meth:`shrunk` for a tower of one image size, with interpolated positions.

        Raises:
            NotImplementedError: If the tower is neither CLIP nor SigLIP.
        """
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


def centres_of(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Return the centres of a grid's cells in raster order, in [0, 1], (rows * columns, 2)."""
    row = (torch.arange(rows, device=device) + 0.5) / rows
    column = (torch.arange(columns, device=device) + 0.5) / columns
    return torch.stack(torch.meshgrid(row, column, indexing="ij"), -1).flatten(0, 1)


def lay_out_tiles(inside: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay out a grid of tiles in raster order, followed by the whole image as one more tile.

    Args:
        inside: Centres of the n tokens in one tile, which form a square, (n, 2).
        rows: Rows of tiles, 0 if there is only the whole image.
        columns: Columns of tiles.

    Returns:
        Centres of the tokens in the image, and height and width of the region each token shows, both
        ((rows * columns + 1) * n, 2).
    """
    shape = inside.new_tensor([max(rows, 1), max(columns, 1)])
    centres = [(inside + inside.new_tensor([row, column])) / shape for row in range(rows) for column in range(columns)]
    cell = torch.full_like(inside, len(inside) ** -0.5)
    return torch.cat([*centres, inside]), torch.cat([*(cell / shape for _ in centres), cell])


def side_of_square(count: float) -> int:
    """Return the side of a square of ``count`` tokens.

    Raises:
        ValueError: If ``count`` is not a square number.
    """
    side = round(count**0.5)
    if side * side != count:
        raise ValueError(f"expected a square of visual tokens, the model gives {count:g}")
    return side
