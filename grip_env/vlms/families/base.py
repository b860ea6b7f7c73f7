"""What a model family has to say of itself: what stands for an image in the prompt, and where its tokens are in it.

The tokens themselves always come from the model's own ``get_image_features``, so that feature layers, tiling and
merging are never rebuilt here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

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
    """Return rows and columns of the finest grid of at most ``count`` cells that shows a picture of rows x columns.

    The axis that loses more is to lose as little as can be; then as many cells as fit are used. Neither axis gets finer
    than it is. Of two grids alike, the one with more columns.

    Args:
        count: At least 1.
        rows: Rows of the whole picture.
        columns: Its columns.

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
    """Resize images, float (B, C, H, W), with antialiasing; no value leaves the range of its image.

    It is linear, and so is what image processors do to colours: the order of the two makes no difference.
    """
    if pixels.shape[-2:] == (height, width):
        return pixels
    small = torch.nn.functional.interpolate(pixels.float(), size=(height, width), mode="bicubic", antialias=True)
    return small.clamp(pixels.amin((1, 2, 3), keepdim=True), pixels.amax((1, 2, 3), keepdim=True)).to(pixels.dtype)


CHANNELS_LAST: dict[str, Any] = {"input_data_format": "channels_last", "return_tensors": "pt"}
"""What image processors are told: they guess where the colours are, and take a side of 1, 3 or 4 pixels for them."""


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
    first_position = 0
    """The place of the first token in the text."""
    key: ClassVar[str]
    """What names the family in keys of caches, and stays as it is whatever becomes of the class's module; each class
    has one of its own, and one that has none is named by its module and name."""
    largest = 2**14
    """Largest number that a size in the settings of an image processor may be: a side, in pixels."""

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

    def position_ids(self, ids: torch.Tensor, picture: Picture) -> torch.Tensor:
        """Return where each of the ids of one whole sequence (L,) is in the text, long (L,) or (L, axes)."""
        return torch.arange(len(ids), device=ids.device) + self.first_position

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

    def check_sizes(self) -> None:
        """Raise ValueError if the image processor would enlarge images beyond all memory."""
        for name in ("size", "crop_size"):
            size = getattr(self.processor.image_processor, name, None) or {}
            sides = dict(size).values() if not isinstance(size, int) else [size]
            if any(isinstance(side, int | float) and side > self.largest for side in sides):
                raise ValueError(f"the image processor's {name} is {size}, where {self.largest} is the most")

    def outputs(self, tokens: torch.Tensor, deepstack: torch.Tensor | None) -> Any:
        """Wrap visual tokens (K, D) of all rows of a batch, in order, as the model's encoder does."""
        pooled: Any = tokens[None] if self.stacked else [tokens]
        return BaseModelOutputWithPooling(pooler_output=pooled)

    def check_text(self, text: str) -> None:
        """Raise ValueError if a question or an answer holds what stands for an image in the prompt."""
        for marker in (self.marker, self.image_token):
            if marker in text:
                raise ValueError(f"holds {marker!r}, which stands for an image in this model's prompts: remove it")

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
            centres = centres_of(rows, columns, tokens.device)
            centres = centres * centres.new_tensor([height, width]) + centres.new_tensor([top, left])
            found.append(Picture(tokens, centres.clamp(0, 1), self.text(), [len(tokens)]))
        return found

    def pixels(self, images: Sequence[np.ndarray]) -> dict[str, Any]:
        """Return what the image processor makes of images."""
        return dict(self.processor.image_processor(images=list(images), **CHANNELS_LAST).to(self.model.device))

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


def centres_of(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Return row and column of the cells of a grid in raster order, in [0, 1], (rows * columns, 2)."""
    row = (torch.arange(rows, device=device) + 0.5) / rows
    column = (torch.arange(columns, device=device) + 0.5) / columns
    return torch.stack(torch.meshgrid(row, column, indexing="ij"), -1).flatten(0, 1)


def lay_out_tiles(inside: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
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


def side_of_square(count: float) -> int:
    """Return the side of a square of ``count`` tokens.

    Raises:
        ValueError: If it is none.
    """
    side = round(count**0.5)
    if side * side != count:
        raise ValueError(f"expected a square of visual tokens, the model gives {count:g}")
    return side
