"""Pictures of the kept tokens over the image, and grids of such pictures."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

__all__ = ["Panel", "captioned", "draw_selection", "gallery"]

_PAPER = (250, 250, 248)
_INK = (28, 30, 34)
_GREY = (112, 116, 124)
_HAIRLINE = (214, 214, 210)
_MOUNT = (228, 228, 224)
_BAR = (42, 111, 187)
_OUTLINE = np.array([255, 255, 255], dtype=np.float32)
_RELEVANT = (255, 190, 60)
_DIM = 0.40  # brightness left to dropped cells
_FADE = 0.70  # how far their colours move to grey
_ROWS = 3  # of text in a video frame

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Panel:
    """Picture of a gallery, with a caption."""

    image: np.ndarray
    """uint8 (H, W, 3)."""
    caption: str = ""
    """Line of text below the picture."""


def draw_selection(
    image: np.ndarray,
    positions: np.ndarray,
    selection: np.ndarray | None = None,
    lines: Sequence[str] = (),
    relevant: np.ndarray | None = None,
    size: int = 480,
    cells: np.ndarray | None = None,
    status: Sequence[str] = (),
    square: bool = False,
    likelihood: tuple[float | None, float] | None = None,
) -> np.ndarray:
    """Draw an image with the cells of kept visual tokens bright and the others faded.

    A light outline surrounds the bright cells.

    Args:
        image: uint8 (H, W, 3).
        positions: (N, 2) row and column of each token's centre in the image, in [0, 1]; their spacing gives
            the size of the cells.
        selection: bool (N,), True for kept tokens; ``None`` shows the plain image.
        lines: Text under the image, wrapped; the first line is set larger.
        relevant: bool (N,); these cells get a small dot.
        size: Length of the image's longer side, in pixels; up to a fifth less for a small image, which is enlarged by a
            whole factor.
        cells: (N, 2) height and width of the area each token shows, as shares of the image, for models that see both
            the whole image and its tiles: the area of any kept token stays bright.
        status: Text below ``lines``, one row for each entry, as in :func:`captioned`. It turns the picture into a video
            frame: ``square``, and of the same size for all images and all texts.
        square: Centre the image on a square, so that all pictures have the same size.
        likelihood: See :func:`captioned`; it also turns the picture into a video frame.

    Returns:
        uint8 (height, width, 3), with a strip below the image if there is text.

    Raises:
        ValueError: If the shapes of image, positions and masks do not match.
    """
    picture = np.asarray(image)
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(f"image must be uint8 of shape (H, W, 3); got {picture.dtype} of shape {picture.shape}")
    centres = np.asarray(positions, dtype=np.float64)
    for name, mask in (("selection", selection), ("relevant", relevant)):
        if mask is not None and np.shape(mask) != centres.shape[:1]:
            raise ValueError(
                f"{name} must have shape {centres.shape[:1]}, one entry per position; got {np.shape(mask)}"
            )
    if cells is not None and np.shape(cells) != centres.shape:
        raise ValueError(f"cells must have shape {centres.shape}, as positions have; got {np.shape(cells)}")
    drawn = _resized(picture, size)
    boxes = _boxes(centres, drawn.shape[0], drawn.shape[1], cells)
    if selection is not None:
        drawn = _faded(drawn, boxes[np.asarray(selection, dtype=bool)])
    if relevant is not None:
        drawn = _dotted(drawn, boxes[np.asarray(relevant, dtype=bool)])
    frame = bool(status) or likelihood is not None
    if square or frame:
        drawn = _mounted(drawn, size)
    return captioned(drawn, lines, status, size, likelihood) if lines or frame else drawn


def captioned(
    picture: np.ndarray,
    lines: Sequence[str] = (),
    status: Sequence[str] = (),
    size: int = 480,
    likelihood: tuple[float | None, float] | None = None,
) -> np.ndarray:
    """Add a strip with text below a picture.

    With ``status`` or ``likelihood`` the result is a video frame. Its size then depends only on the size of the picture
    and the number of status rows, not on the text, so that wrappers can record or tile several episodes; width and
    height are even, as video codecs require.

    Args:
        picture: uint8 (H, W, 3).
        lines: Text, wrapped; the first line is set larger. A video frame has room for three rows; longer text is cut
            off with dots.
        status: One row for each entry; longer text is cut off with dots.
        size: Width of the pictures that the font size is chosen for, in pixels.
        likelihood: Probabilities of an answer token, in [0, 1], with the kept tokens (``None`` if not known yet) and
            with all tokens, drawn as the length of a bar and a mark on it.

    Returns:
        uint8 (height, width, 3).
    """
    frame = bool(status) or likelihood is not None
    width = max(picture.shape[1], size // 2)  # room for words under the narrowest picture
    margin = max(8, size // 32)
    styles = (_font(size / 24), _INK, round(max(8, size / 24) * 1.45)), (_font(size / 30), _GREY, _row(size))
    rows: list[tuple[str, _Font, tuple[int, int, int], int]] = []
    for number, text in enumerate(lines):
        font, colour, height = styles[min(number, 1)]
        parts = _wrapped(text, font, width - 2 * margin, _ROWS - len(rows) if frame else None)
        rows += [(part, font, colour, height) for part in parts]
    font, colour, height = styles[1]
    rows += [(_shortened(text, font, width - 2 * margin), font, colour, height) for text in status]
    high = sum(row[3] for row in rows) + 2 * margin
    if frame:
        bar = _row(size) if likelihood is not None else 0
        high = _ROWS * styles[0][2] + len(status) * height + bar + 2 * margin
        high += (picture.shape[0] + high) % 2
        width += width % 2
    sheet = Image.new("RGB", (width, picture.shape[0] + high), _PAPER)
    sheet.paste(Image.fromarray(picture), ((width - picture.shape[1]) // 2, 0))
    pen = ImageDraw.Draw(sheet)
    y = picture.shape[0]
    pen.line((0, y, width, y), _HAIRLINE)
    y += margin
    for text, font, colour, height in rows:
        pen.text((margin, y), text, colour, font)
        y += height
    if likelihood is not None:
        _draw_bar(
            pen, (margin, y + _row(size) // 3, width - margin, y + _row(size) // 3 + max(6, size // 60)), likelihood
        )
    return np.asarray(sheet).copy()


def gallery(
    panels: Sequence[Sequence[Panel | np.ndarray | None]],
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    title: str = "",
    note: str = "",
    size: int = 240,
) -> np.ndarray:
    """Compose pictures into a labelled grid.

    Args:
        panels: Rows of pictures; ``None`` leaves a cell empty.
        rows: A label for each row, such as the question families.
        columns: A label for each column, such as the budgets.
        title: A heading.
        note: Text at the bottom, wrapped.
        size: Longer side of a picture, in pixels; the aspect ratio is kept.

    Returns:
        uint8 (height, width, 3).

    Raises:
        ValueError: If there are no pictures, or the number of labels is wrong.
    """
    grid = [[Panel(p) if isinstance(p, np.ndarray) else p for p in row] for row in panels]
    across = max((len(row) for row in grid), default=0)
    if not any(panel is not None for row in grid for panel in row):
        raise ValueError("a gallery needs at least one picture")
    for name, labels, count in (("rows", rows, len(grid)), ("columns", columns, across)):
        if labels and len(labels) != count:
            raise ValueError(f"{len(labels)} labels for {count} {name}: give one for each, or none")
    margin, gap = size // 10, size // 20
    heading, label, caption = _font(size / 11), _font(size / 15), _font(size / 17)
    line = int(size / 17 * 1.45)
    images = [[_framed(panel.image, size) if panel else None for panel in row] for row in grid]
    heights = [max((image.height for image in row if image), default=0) for row in images]
    captioned = [any(panel is not None and panel.caption for panel in row) for row in grid]
    left = margin + (max(int(label.getlength(text)) for text in rows) + margin // 2 if rows else 0)
    width = left + across * size + (across - 1) * gap + margin
    notes = _wrapped(note, caption, width - 2 * margin) if note else []
    top = margin + (int(size / 11 * 1.9) if title else 0)
    start = top + (int(size / 15 * 1.8) if columns else 0)
    cell_heights = [high + (line + gap // 3 if cap else 0) + gap for high, cap in zip(heights, captioned, strict=True)]
    height = start + sum(cell_heights) - gap + margin + (len(notes) * line + gap if notes else 0)

    sheet = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((margin, margin), title, _INK, heading)
    for column, text in enumerate(columns):
        pen.text((left + column * (size + gap) + size / 2, top), text, _INK, label, anchor="ma")
    y = start
    for row, (panels_here, images_here) in enumerate(zip(grid, images, strict=True)):
        if rows:
            pen.text((left - margin // 2, y + heights[row] / 2), rows[row], _INK, label, anchor="rm")
        for column, (panel, image) in enumerate(zip(panels_here, images_here, strict=True)):
            if panel is None or image is None:
                continue
            x = left + column * (size + gap)
            sheet.paste(image, (x + (size - image.width) // 2, y))
            text = _shortened(panel.caption, caption, size)
            pen.text((x + size / 2, y + image.height + gap // 3), text, _GREY, caption, anchor="ma")
        y += cell_heights[row]
    for text in notes:
        pen.text((margin, y), text, _GREY, caption)
        y += line
    return np.asarray(sheet).copy()


# -- the image ---------------------------------------------------------------------------------------


def _resized(image: np.ndarray, size: int) -> np.ndarray:
    height, width = image.shape[:2]
    longest = max(height, width)
    factor = size // longest
    if factor * longest >= 0.8 * size:  # enlarge by a whole factor if that nearly fills the size
        return np.repeat(np.repeat(image, factor, 0), factor, 1)
    shape = max(1, round(width * size / longest)), max(1, round(height * size / longest))
    return np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.LANCZOS)).copy()


def _mounted(image: np.ndarray, size: int) -> np.ndarray:
    """Centre an image on a square."""
    sheet = Image.new("RGB", (size, size), _MOUNT)
    sheet.paste(Image.fromarray(image), ((size - image.shape[1]) // 2, (size - image.shape[0]) // 2))
    return np.asarray(sheet)


def _boxes(positions: np.ndarray, height: int, width: int, cells: np.ndarray | None) -> np.ndarray:
    """Return top, left, bottom and right of each token's cell in pixels, int (N, 4)."""
    if cells is None:
        half = np.array([_spacing(positions[:, 0]), _spacing(positions[:, 1])]) / 2
    else:
        half = np.asarray(cells, dtype=np.float64) / 2
    scale = np.array([height, width])
    corners = np.concatenate([(positions - half) * scale, (positions + half) * scale], 1)
    return np.clip(np.rint(corners), 0, np.concatenate([scale, scale])).astype(int)


def _spacing(values: np.ndarray) -> float:
    """Return the median distance between neighbouring rows (or columns); 1 for a single one."""
    gaps = np.diff(np.unique(np.round(values, 5)))
    return float(np.median(gaps)) if len(gaps) else 1.0


def _faded(image: np.ndarray, kept: np.ndarray) -> np.ndarray:
    inside = np.zeros(image.shape[:2], dtype=bool)
    for top, left, bottom, right in kept.tolist():
        inside[top:bottom, left:right] = True
    grey = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)  # (H, W)
    dim = (image * (1 - _FADE) + grey[..., None] * _FADE) * _DIM
    drawn = np.where(inside[..., None], image, dim).astype(np.float32)
    if len(kept) and not inside.all():
        # the rim lies just outside the kept cells, so that it covers no part of them, and is thin compared with a cell,
        # so that it does not fill the gaps between them
        sides = (kept[:, 2:] - kept[:, :2]).min(1)
        cell = sides[sides > 0].min(initial=max(image.shape[:2]))
        thickness = max(1, min(round(min(image.shape[:2]) / 240), int(cell) // 6))
        mask = Image.fromarray(inside.astype(np.uint8))
        grown = np.asarray(mask.filter(ImageFilter.MaxFilter(2 * thickness + 1))) > 0
        rim = grown & ~inside
        drawn[rim] = 0.15 * drawn[rim] + 0.85 * _OUTLINE
    return np.clip(np.rint(drawn), 0, 255).astype(np.uint8)


def _dotted(image: np.ndarray, marked: np.ndarray) -> np.ndarray:
    sheet = Image.fromarray(image)
    pen = ImageDraw.Draw(sheet)
    for top, left, bottom, right in marked.tolist():
        row, column = (top + bottom) / 2, (left + right) / 2
        side = min(bottom - top, right - left)
        radius = max(1.0, min(2.5, side / 2), side / 12)  # visible in small cells, unobtrusive in large ones
        box = (column - radius, row - radius, column + radius, row + radius)
        pen.ellipse(box, fill=_RELEVANT, outline=_INK)
    return np.asarray(sheet).copy()


def _framed(image: np.ndarray, size: int) -> Image.Image:
    if image.dtype != np.uint8 or image.ndim != 3:
        raise ValueError(f"a picture must be uint8 of shape (H, W, 3); got {image.dtype} of shape {image.shape}")
    longest = max(image.shape[:2])
    shape = max(1, round(image.shape[1] * size / longest)), max(1, round(image.shape[0] * size / longest))
    method = Image.Resampling.NEAREST if size >= longest else Image.Resampling.LANCZOS
    return Image.fromarray(image).resize(shape, method)


# -- the text ----------------------------------------------------------------------------------------


def _font(size: float) -> _Font:
    return ImageFont.load_default(size=max(8.0, size))


def _row(size: int) -> int:
    """Return the height of a row of small text, in pixels."""
    return round(max(8, size / 30) * 1.45)


def _draw_bar(pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], likelihood: tuple[float | None, float]) -> None:
    """Draw a bar whose length is a probability, with a mark at a second probability."""
    left, top, right, bottom = box
    reached, full = likelihood
    pen.rectangle(box, fill=_HAIRLINE)
    if reached is not None:
        pen.rectangle((left, top, left + round((right - left) * min(max(reached, 0.0), 1.0)), bottom), fill=_BAR)
    mark = left + round((right - left) * min(max(full, 0.0), 1.0))
    pen.rectangle((mark - 1, top - 3, mark + 1, bottom + 3), fill=_INK)


def _wrapped(text: str, font: _Font, width: float, most: int | None = None) -> list[str]:
    """Break text into lines of at most ``width`` pixels.

    Text beyond ``most`` lines is cut off with dots. Words too long for a line, as in languages without spaces, are
    broken as well.
    """
    lines, words = [""], text.split()
    for number, word in enumerate(words):
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
        while (fits := _fitting(lines[-1], font, width)) < len(lines[-1]):
            lines[-1:] = [lines[-1][:fits], lines[-1][fits:]]
            if most is not None and len(lines) > most:
                break
        if most is not None and len(lines) > most:
            rest = " ".join([*lines[most - 1 :], *words[number + 1 :]]) if most else ""
            return [*lines[: most - 1], _shortened(rest, font, width)] if most else []
    return lines


def _fitting(text: str, font: _Font, width: float) -> int:
    """Return how many characters of ``text`` fit into ``width`` pixels, at least 1."""
    reach = 16
    while reach < len(text) and font.getlength(text[:reach]) <= width:  # avoids measuring much more than fits
        reach *= 2
    return max(1, bisect_right(range(min(reach, len(text)) + 1), width, key=lambda n: font.getlength(text[:n])) - 1)


def _shortened(text: str, font: _Font, width: float) -> str:
    """Return ``text`` on one line, cut off with dots if longer than ``width`` pixels."""
    text = " ".join(text.split())
    if _fitting(text, font, width) >= len(text):
        return text
    return text[: _fitting(text, font, width - font.getlength("..."))].rstrip() + "..."
