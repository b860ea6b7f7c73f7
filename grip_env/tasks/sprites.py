"""Sprites and backgrounds for the procedural scenes.

Every sprite is an antialiased opacity mask that is drawn once, at eight times its size, and cached. A scene then takes
a handful of small array operations, so that drawing never becomes the bottleneck of training. Channels come first
while a picture is drawn: operations along whole rows are several times faster than operations along three channels.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

__all__ = [
    "DECORATIONS",
    "GLYPH_WIDTH",
    "PALETTE",
    "SHAPES",
    "VARIANTS",
    "background",
    "composite",
    "sign_masks",
    "sprite",
]

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
"""Shapes that questions ask about."""

DECORATIONS = ("bar", "zigzag", "arc", "dots", "blob")
"""Shapes of the clutter, which has the colours of objects and which no question names."""

VARIANTS = 8
"""Number of variants (rotations, outlines) of each sprite."""

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 35),
    "orange": (240, 135, 25),
    "yellow": (238, 224, 50),
    "green": (45, 160, 55),
    "cyan": (60, 205, 215),
    "blue": (40, 75, 220),
    "purple": (135, 55, 185),
    "pink": (248, 140, 195),
}

_OVERSAMPLE = 8

# 5 x 7 dot-matrix digits: each number holds the five bits of a row.
_DIGITS = (
    (14, 17, 19, 21, 25, 17, 14),
    (4, 12, 4, 4, 4, 4, 14),
    (14, 17, 1, 6, 8, 16, 31),
    (30, 1, 1, 14, 1, 1, 30),
    (2, 6, 10, 18, 31, 2, 2),
    (31, 16, 30, 1, 1, 17, 14),
    (6, 8, 16, 30, 17, 17, 14),
    (31, 1, 2, 4, 8, 8, 8),
    (14, 17, 17, 14, 17, 17, 14),
    (14, 17, 17, 15, 1, 2, 12),
)


def _polygon(corners: int, inner: float, angle: float) -> list[tuple[float, float]]:
    """Return a unit polygon (a star if ``inner`` < 1) around the origin; ``angle`` in radians."""
    steps = corners if inner == 1 else 2 * corners
    points = []
    for step in range(steps):
        radius = inner if inner != 1 and step % 2 else 1.0
        turn = angle + 2 * math.pi * step / steps - math.pi / 2
        points.append((radius * math.cos(turn), radius * math.sin(turn)))
    return points


def _rotate(points: list[tuple[float, float]], angle: float) -> list[tuple[float, float]]:
    cos, sin = math.cos(angle), math.sin(angle)
    return [(x * cos - y * sin, x * sin + y * cos) for x, y in points]


@cache
def sprite(kind: str, size: int, variant: int) -> np.ndarray:
    """Return the opacity mask of one sprite.

    Args:
        kind: One of SHAPES or DECORATIONS.
        size: Side of the square the sprite fills, in pixels.
        variant: 0 <= variant < VARIANTS: a slight rotation of a shape, any rotation or outline of a decoration.

    Returns:
        float32 (size, size) in [0, 1]. Shared: do not write to it.
    """
    side = size * _OVERSAMPLE
    picture = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(picture)
    half = side / 2

    def place(points: list[tuple[float, float]], scale: float = 1.0) -> list[tuple[float, float]]:
        return [(half + half * scale * x, half + half * scale * y) for x, y in points]

    tilt = math.radians(-14 + 4 * variant)  # shapes stay nearly upright, so that no square looks like a diamond
    turn = math.pi * variant / VARIANTS  # decorations turn freely
    stroke = max(2, round(side * 0.13))
    if kind == "circle":
        draw.ellipse([0, 0, side - 1, side - 1], fill=255)
    elif kind == "ring":
        draw.ellipse([0, 0, side - 1, side - 1], fill=255)
        hole = side * 0.28
        draw.ellipse([hole, hole, side - hole, side - hole], fill=0)
    elif kind == "square":
        draw.polygon(place(_rotate([(-1, -1), (1, -1), (1, 1), (-1, 1)], tilt), 0.84), fill=255)
    elif kind == "triangle":
        draw.polygon(place([(x, y + 0.22) for x, y in _polygon(3, 1, tilt)], 1.0), fill=255)
    elif kind == "star":
        draw.polygon(place(_polygon(5, 0.42, tilt)), fill=255)
    elif kind == "cross":
        arm = 0.34
        for box in ([(-1, -arm), (1, -arm), (1, arm), (-1, arm)], [(-arm, -1), (arm, -1), (arm, 1), (-arm, 1)]):
            draw.polygon(place(_rotate([*box], tilt), 0.95), fill=255)
    elif kind == "bar":
        draw.line(place(_rotate([(-1, 0), (1, 0)], turn), 0.9), fill=255, width=stroke)
    elif kind == "zigzag":
        points = [(-1.0, -0.3), (-0.5, 0.35), (0.0, -0.3), (0.5, 0.35), (1.0, -0.3)]
        draw.line(place(_rotate(points, turn), 0.88), fill=255, width=stroke, joint="curve")
    elif kind == "arc":
        start = 360 * variant / VARIANTS
        draw.arc([stroke, stroke, side - stroke, side - stroke], start, start + 150, fill=255, width=stroke)
    elif kind == "dots":
        radius = side * 0.1
        for dot in range(3 + variant % 3):
            away = 0.45 + 0.25 * ((dot * 7 + variant) % 3) / 2
            around = turn + 2 * math.pi * dot / (3 + variant % 3)
            x, y = half + half * away * math.cos(around), half + half * away * math.sin(around)
            draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=255)
    elif kind == "blob":
        points = []
        for step in range(24):
            around = 2 * math.pi * step / 24
            radius = 0.62 + 0.22 * math.sin(2 * around + variant) + 0.13 * math.sin(3 * around + 2.3 * variant)
            points.append((radius * math.cos(around), 0.62 * radius * math.sin(around)))
        draw.polygon(place(_rotate(points, turn)), fill=255)
    else:
        raise ValueError(f"unknown sprite {kind!r}: choose one of {', '.join(SHAPES + DECORATIONS)}")
    picture = picture.resize((size, size), Image.Resampling.BOX)
    mask = np.asarray(picture, dtype=np.float32) / 255
    mask.setflags(write=False)
    return mask


GLYPH_WIDTH = 12
"""Width of a digit and the gap beside it, in pixels: how much wider a plate is than a card."""


@cache
def sign_masks(kind: str, number: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the opacity of a sign and of its number, each float32 (size, width) in [0, 1].

    Args:
        kind: "card", as wide as high, with one digit; "plate", wider, with two.
        number: What it shows.
        size: Height in pixels, at least 14.
    """
    digits = [int(digit) for digit in str(number)]
    width = size + GLYPH_WIDTH * (kind == "plate")
    shape = width * _OVERSAMPLE, size * _OVERSAMPLE
    picture = Image.new("L", shape, 0)
    ImageDraw.Draw(picture).rounded_rectangle(
        [0, 0, shape[0] - 1, shape[1] - 1], radius=size * _OVERSAMPLE // 8, fill=255
    )
    sign = np.asarray(picture.resize((width, size), Image.Resampling.BOX), dtype=np.float32) / 255
    ink = np.zeros((size, width), dtype=np.float32)
    top, left = (size - 14) // 2, (width - GLYPH_WIDTH * (len(digits) - 1) - 10) // 2
    for place, digit in enumerate(digits):
        dots = np.array([[bits >> (4 - column) & 1 for column in range(5)] for bits in _DIGITS[digit]], np.float32)
        start = left + GLYPH_WIDTH * place
        ink[top : top + 14, start : start + 10] = np.kron(dots, np.ones((2, 2), dtype=np.float32))  # 14 x 10 pixels
    sign.setflags(write=False)
    ink.setflags(write=False)
    return sign, ink


@cache
def _ramp(side: int) -> np.ndarray:
    return np.arange(side, dtype=np.float32) / side


def background(rng: np.random.Generator, side: int) -> np.ndarray:
    """Draw a textured, nearly grey background: float32 (3, side, side) in [0, 255]."""
    base = rng.uniform(85, 165) + rng.uniform(-14, 14, 3)
    cells = rng.integers(-16, 17, (8, 8)).astype(np.float32)
    step = side // 7 + 1
    top, left = rng.integers(0, step, 2)
    patches = cells.repeat(step, 0).repeat(step, 1)[top : top + side, left : left + side]
    fx, fy = rng.uniform(-60, 60, 2)
    strength, phase = rng.uniform(0, 12), rng.uniform(0, 2 * math.pi)
    # sin(a + b) from two short vectors: a full-size sine would cost more than the rest of the scene
    a, b = _ramp(side) * np.float32(fx) + np.float32(phase), _ramp(side) * np.float32(fy)
    waves = np.stack([np.cos(b), np.sin(b)], 1) @ np.stack([np.sin(a), np.cos(a)])  # (side, side)
    grain = np.frombuffer(rng.bytes(side * side), dtype=np.uint8).reshape(side, side).astype(np.float32)
    waves *= np.float32(strength)
    waves += patches
    grain *= np.float32(24 / 255)  # from 0 to 24; its mean is subtracted below
    waves += grain
    return waves + (base - 12).astype(np.float32)[:, None, None]


def composite(canvas: np.ndarray, mask: np.ndarray, colour: np.ndarray, top: int, left: int) -> None:
    """Paint ``colour`` (3, 1, 1) through ``mask`` (h, w) onto ``canvas`` (3, H, W), in place."""
    height, width = mask.shape
    region = canvas[:, top : top + height, left : left + width]
    change = colour - region
    change *= mask
    region += change
