"""Contents and layout of scenes: random things and their places, and the bucket of a scene."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np

from grip_env.tasks import sprites

__all__ = [
    "BUCKETS",
    "COLOURS",
    "SIDE",
    "Contents",
    "Thing",
    "arrange",
    "bucket",
    "draw_clutter",
    "draw_contents",
    "objects_of",
    "steer",
]

SIDE = 96
"""Height and width of a scene, in pixels."""

COLOURS = tuple(sprites.PALETTE)

BUCKETS = 5
"""Number of buckets of scenes; each bucket belongs to one split."""

Contents: TypeAlias = "list[tuple[str, str, int | None]]"
"""Kind, colour and (for cards) digit of a scene's objects: shapes first, then cards."""

_PATTERNS = ((3, 2, 1, 1), (3, 1, 1, 1), (3, 1, 1), (2, 2, 1, 1), (2, 1, 1, 1), (3, 2, 1, 1))
_BOARD = SIDE + 1


@dataclass
class Thing:
    """One object or decoration of a scene.

    Only cards have a digit; ``size``, ``top`` and ``left`` are in pixels.
    """

    kind: str
    colour: str
    size: int
    variant: int
    digit: int | None = None
    top: int = -1
    left: int = -1

    @property
    def is_shape(self) -> bool:
        """True if questions can name this thing by its shape."""
        return self.kind in sprites.SHAPES

    @property
    def mask(self) -> np.ndarray:
        """Opacity of the thing within its square, float32 (size, size) in [0, 1]."""
        if self.digit is None:
            return sprites.sprite(self.kind, self.size, self.variant)
        return sprites.card_masks(self.digit, self.size)[0]

    @property
    def centre(self) -> tuple[float, float]:
        """Row and column of the centre, in pixels."""
        return self.top + self.size / 2, self.left + self.size / 2


def draw_contents(rng: random.Random) -> Contents:
    """Draw the kind, colour and digit of the shapes and cards of a scene."""
    contents: Contents = []
    for kind, count in zip(_pick(rng, sprites.SHAPES, 4), _PATTERNS[_below(rng, len(_PATTERNS))], strict=False):
        contents += [(kind, COLOURS[_below(rng, len(COLOURS))], None) for _ in range(count)]
    return contents + [("card", colour, _below(rng, 10)) for colour in _pick(rng, COLOURS, 2)]


def steer(contents: Contents, rng: random.Random, family: str, answer: str) -> None:
    """Change ``contents`` in place so that a question with ``answer`` becomes likely."""
    kinds = [kind for kind, _, digit in contents if digit is None]
    if family == "color":
        single = [index for index, kind in enumerate(kinds) if kinds.count(kind) == 1]
        index = single[_below(rng, len(single))]
        contents[index] = (kinds[index], answer, None)
    elif family == "reading":
        index = len(kinds) + _below(rng, len(contents) - len(kinds))
        contents[index] = (*contents[index][:2], int(answer))
    elif family == "shape":
        swap = kinds[_below(rng, len(kinds))]
        renamed = {swap: answer, answer: swap}
        for index, kind in enumerate(kinds):
            contents[index] = (renamed.get(kind, kind), *contents[index][1:])


def objects_of(contents: Contents, rng: random.Random) -> list[Thing]:
    """Draw the size and variant of every shape and card; places are not set yet."""
    return [
        Thing(kind, colour, 14 + _below(rng, 5), _below(rng, sprites.VARIANTS))
        if digit is None
        else Thing(kind, colour, 18 + _below(rng, 3), 0, digit)
        for kind, colour, digit in contents
    ]


def draw_clutter(rng: random.Random) -> list[Thing]:
    """Draw the decorations of a scene; places are not set yet."""
    colours = _pick(rng, COLOURS, 4)  # few, so that some object has a colour that nothing else has
    return [
        Thing(
            sprites.DECORATIONS[_below(rng, len(sprites.DECORATIONS))],
            colours[_below(rng, 4)],
            11 + _below(rng, 10),
            _below(rng, sprites.VARIANTS),
        )
        for _ in range(8 + _below(rng, 4))
    ]


def _below(rng: random.Random, limit: int) -> int:
    """Draw an integer from 0 to limit - 1.

    This is several times faster than ``randrange``; its bias of 1e-15 does not matter.
    """
    return int(rng.random() * limit)


def _pick(rng: random.Random, items: tuple[str, ...], count: int) -> list[str]:
    """Draw ``count`` items without replacement."""
    left = list(items)
    return [left.pop(_below(rng, len(left))) for _ in range(count)]


def bucket(contents: Contents) -> int:
    """Return the bucket of a scene.

    The bucket is a digest of the kinds, colours and digits of the objects; it does not depend on their places.
    """
    named = sorted([f"{kind} {colour} {digit}" for kind, colour, digit in contents])
    return hashlib.blake2b("|".join(named).encode(), digest_size=4, person=b"grip_env scenes").digest()[0] % BUCKETS


@cache
def _square(size: int) -> int:
    """Return the bits of a square at the top left of a board, with a margin of one pixel."""
    return sum(((2 << size) - 1) << (row * _BOARD) for row in range(size + 1))


def arrange(things: list[Thing], rng: random.Random, taken: int = 0) -> tuple[list[Thing], int] | None:
    """Place things at random without overlap; decorations without room are left out.

    Args:
        things: Things to place, in this order; ``top`` and ``left`` are set.
        rng: The random generator.
        taken: A board with one bit per pixel, set where the pixel is occupied already.

    Returns:
        The things that were placed, and the board with them; ``None`` if an object found no room.
    """
    placed: list[Thing] = []
    for thing in things:
        square, decoration = _square(thing.size), thing.kind in sprites.DECORATIONS
        room = SIDE - thing.size + 1
        for _ in range(12 if decoration else 40):
            top, left = int(rng.random() * room), int(rng.random() * room)
            if not taken >> (top * _BOARD + left) & square:
                taken |= square << (top * _BOARD + left)
                thing.top, thing.left = top, left
                placed.append(thing)
                break
        else:
            if not decoration:
                return None
    return placed, taken
