"""What is in a scene and where: its things, how they are drawn at random, and which bucket they fall into."""

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
"""How many buckets scenes fall into; each belongs to one split."""

Contents: TypeAlias = "list[tuple[str, str, int | None]]"
"""Kind, colour and (for cards) digit of a scene's objects: shapes first, then cards."""

_PATTERNS = ((3, 2, 1, 1), (3, 1, 1, 1), (3, 1, 1), (2, 2, 1, 1), (2, 1, 1, 1), (3, 2, 1, 1))
_BOARD = SIDE + 1


@dataclass
class Thing:
    """One object or decoration: what it is and where. Cards have a digit; ``left`` and ``top`` are in pixels."""

    kind: str
    colour: str
    size: int
    variant: int
    digit: int | None = None
    top: int = -1
    left: int = -1

    @property
    def is_shape(self) -> bool:
        """Whether questions can name this thing by its shape."""
        return self.kind in sprites.SHAPES

    @property
    def mask(self) -> np.ndarray:
        """Which part of its square it fills: float32 (size, size) in [0, 1]."""
        if self.digit is None:
            return sprites.sprite(self.kind, self.size, self.variant)
        return sprites.card_masks(self.digit, self.size)[0]

    @property
    def centre(self) -> tuple[float, float]:
        """Row and column of the centre, in pixels."""
        return self.top + self.size / 2, self.left + self.size / 2


def draw_contents(rng: random.Random) -> Contents:
    """Draw kind, colour and digit of the shapes and cards of a scene."""
    contents: Contents = []
    for kind, count in zip(_pick(rng, sprites.SHAPES, 4), _PATTERNS[_below(rng, len(_PATTERNS))], strict=False):
        contents += [(kind, COLOURS[_below(rng, len(COLOURS))], None) for _ in range(count)]
    return contents + [("card", colour, _below(rng, 10)) for colour in _pick(rng, COLOURS, 2)]


def steer(contents: Contents, rng: random.Random, family: str, answer: str) -> None:
    """Change one property, in place, so that a question of ``family`` with ``answer`` becomes likely."""
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
    """Give every shape and card its size and variant, but no place yet."""
    return [
        Thing(kind, colour, 14 + _below(rng, 5), _below(rng, sprites.VARIANTS))
        if digit is None
        else Thing(kind, colour, 18 + _below(rng, 3), 0, digit)
        for kind, colour, digit in contents
    ]


def draw_clutter(rng: random.Random) -> list[Thing]:
    """Draw the decorations of a scene, without places."""
    colours = _pick(rng, COLOURS, 4)  # few enough that some object's colour is its own
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
    """Draw from 0 to limit - 1; several times faster than randrange, its bias of 1e-15 is of no matter."""
    return int(rng.random() * limit)


def _pick(rng: random.Random, items: tuple[str, ...], count: int) -> list[str]:
    """Draw ``count`` different items."""
    left = list(items)
    return [left.pop(_below(rng, len(left))) for _ in range(count)]


def bucket(contents: Contents) -> int:
    """Return the bucket of a scene, a digest of its objects: what questions can ask about, wherever it is."""
    named = sorted([f"{kind} {colour} {digit}" for kind, colour, digit in contents])
    return hashlib.blake2b("|".join(named).encode(), digest_size=4, person=b"grip_env scenes").digest()[0] % BUCKETS


@cache
def _square(size: int) -> int:
    """Return the bits of a square of ``size`` pixels and a margin of one, in the top left corner of a board."""
    return sum(((2 << size) - 1) << (row * _BOARD) for row in range(size + 1))


def arrange(things: list[Thing], rng: random.Random, taken: int = 0) -> tuple[list[Thing], int] | None:
    """Give every object a place of its own; decorations without room are left out.

    Args:
        things: What to place, in this order.
        rng: Where the draws come from.
        taken: A board of bits, one for each pixel: where there is something already.

    Returns:
        What was placed, and the board with it; ``None`` if an object found no room.
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
