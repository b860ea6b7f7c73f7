"""Smaller images, for fewer visual tokens: how many rows and columns, and the resizing itself."""

from __future__ import annotations

import torch

__all__ = ["grid_within", "shrink"]


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
