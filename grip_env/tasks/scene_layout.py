"""Contents and layout of scenes: random things and their places, and the bucket of a scene."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np

from grip_env.tasks import sprites
from grip_env.tasks.scene_levels import COLOURS, STANDARD, Level

__all__ = [
    "BUCKETS",
    "COLOURS",
    "Contents",
    "Thing",
    "arrange",
    "bucket",
    "draw_clutter",
    "draw_contents",
    "objects_of",
    "steer",
]

BUCKETS = 5
"""Number of buckets of scenes; each bucket belongs to one split."""

Contents: TypeAlias = "list[tuple[str, str, int | None]]"
"""Kind, colour and (for cards and plates) number of a scene's objects: shapes first, then cards, then plates."""


@dataclass
class Thing:
    """An object or decoration with its position in pixels; cards and plates show a number."""

    kind: str
    colour: str
    size: int
    variant: int
    number: int | None = None
    top: int = -1
    left: int = -1

    @property
    def is_shape(self) -> bool:
        """True if questions can name this thing by its shape."""
        return self.kind in sprites.SHAPES

    @property
    def mask(self) -> np.ndarray:
        """Opacity within its rectangle, float32 (height, width) in [0, 1]."""
        if self.number is None:
            return sprites.sprite(self.kind, self.size, self.variant)
        return sprites.sign_masks(self.kind, self.number, self.size)[0]

    @property
    def ink(self) -> np.ndarray:
        """Opacity of the number on a card or plate, float32 (height, width) in [0, 1]."""
        if self.number is None:
            raise ValueError(f"there is no number on a {self.kind}")
        return sprites.sign_masks(self.kind, self.number, self.size)[1]

    @property
    def width(self) -> int:
        """Width in pixels; ``size`` is the height."""
        return self.size + sprites.GLYPH_WIDTH if self.kind == "plate" else self.size

    @property
    def centre(self) -> tuple[float, float]:
        """Row and column of the centre, in pixels."""
        return self.top + self.size / 2, self.left + self.width / 2


def draw_contents(rng: random.Random, level: Level = STANDARD) -> Contents:
    """Draw kind, colour and number of the objects of a scene."""
    contents: Contents = []
    kinds = _pick(rng, sprites.SHAPES, max(map(len, level.patterns)))
    for kind, count in zip(kinds, level.patterns[_below(rng, len(level.patterns))], strict=False):
        contents += [(kind, COLOURS[_below(rng, len(COLOURS))], None) for _ in range(count)]
    contents += [("card", colour, _below(rng, 10)) for colour in _pick(rng, COLOURS, level.cards)]
    return contents + [("plate", colour, 10 + _below(rng, 90)) for colour in _pick(rng, COLOURS, level.plates)]


def steer(contents: Contents, rng: random.Random, family: str, answer: str) -> None:
    """Change properties, in place, to make a question of ``family`` with ``answer`` likely."""
    if family in _STEERING:
        _STEERING[family](contents, rng, answer)


def _any(rng: random.Random, found: Sequence[int]) -> int:
    return found[_below(rng, len(found))]


def _recolour(contents: Contents, index: int, colour: str) -> None:
    contents[index] = (contents[index][0], colour, contents[index][2])


def _renumber(contents: Contents, index: int, number: int | None) -> None:
    contents[index] = (*contents[index][:2], number)


def _named(contents: Contents, kind: str) -> list[int]:
    return [index for index, (other, _, _) in enumerate(contents) if other == kind]


def _shapes(contents: Contents) -> list[str]:
    return [kind for kind, _, number in contents if number is None]  # they come first


def _steer_color(contents: Contents, rng: random.Random, answer: str) -> None:
    kinds = _shapes(contents)
    _recolour(contents, _any(rng, [index for index, kind in enumerate(kinds) if kinds.count(kind) == 1]), answer)


def _steer_reading(contents: Contents, rng: random.Random, answer: str) -> None:
    _renumber(contents, _any(rng, _named(contents, "card")), int(answer))


def _steer_number(contents: Contents, rng: random.Random, answer: str) -> None:
    _renumber(contents, _any(rng, _named(contents, "plate")), int(answer))


def _steer_shape(contents: Contents, rng: random.Random, answer: str) -> None:
    kinds = _shapes(contents)
    swap = kinds[_below(rng, len(kinds))]
    renamed = {swap: answer, answer: swap}
    for index, kind in enumerate(kinds):
        contents[index] = (renamed.get(kind, kind), *contents[index][1:])
    used = [colour for _, colour, _ in contents]
    if len(contents) > 2 * len(COLOURS):  # so many that hardly one has a colour of its own: give one of the shapes one
        index = _any(rng, [index for index, kind in enumerate(kinds) if renamed.get(kind, kind) == answer])
        for place, colour in enumerate(used):
            if colour == used[index] and place != index:
                # cards differ from cards in colour, and plates from plates
                alike = [] if place < len(kinds) else [contents[i][1] for i in _named(contents, contents[place][0])]
                others = [other for other in COLOURS if other not in (colour, *alike)]
                _recolour(contents, place, others[_below(rng, len(others))])


def _steer_larger(contents: Contents, rng: random.Random, answer: str) -> None:
    cards = _named(contents, "card")
    found = [index for index in cards if contents[index][1] == answer]
    index = found[0] if found else _any(rng, cards)
    _recolour(contents, index, answer)
    other = _any(rng, [card for card in cards if card != index])
    digits = sorted(contents[card][2] or 0 for card in (index, other))
    _renumber(contents, index, digits[1])
    _renumber(contents, other, digits[0])


def _steer_same(contents: Contents, rng: random.Random, answer: str) -> None:
    cards, kinds = _named(contents, "card"), _shapes(contents)
    single = [index for index, kind in enumerate(kinds) if kinds.count(kind) == 1]
    group = cards if len(single) < 2 or _below(rng, 2) else single
    one = _any(rng, group)
    other = _any(rng, [index for index in group if index != one])
    if answer == "yes" and group is cards:
        _renumber(contents, other, contents[one][2])
    elif answer == "yes":
        _recolour(contents, other, contents[one][1])


def _steer_near(contents: Contents, rng: random.Random, answer: str) -> None:
    kinds = _shapes(contents)
    _recolour(contents, _any(rng, [index for index, kind in enumerate(kinds) if kinds.count(kind) > 1]), answer)


def _steer_odd(contents: Contents, rng: random.Random, answer: str) -> None:
    kinds = _shapes(contents)
    many = [index for index, kind in enumerate(kinds) if kinds.count(kind) >= 3]
    if many:
        odd = _any(rng, many)
        others = [other for other in COLOURS if other != answer]
        colour = others[_below(rng, len(others))]
        for index, kind in enumerate(kinds):
            if kind == kinds[odd]:
                _recolour(contents, index, answer if index == odd else colour)


_STEERING: dict[str, Callable[[Contents, random.Random, str], None]] = {
    "color": _steer_color,
    "reading": _steer_reading,
    "shape": _steer_shape,
    "larger": _steer_larger,
    "same": _steer_same,
    "near": _steer_near,
    "number": _steer_number,
    "odd": _steer_odd,
}


def objects_of(contents: Contents, rng: random.Random) -> list[Thing]:
    """Give every object its size and variant, but no place yet."""
    return [
        Thing(kind, colour, 14 + _below(rng, 5), _below(rng, sprites.VARIANTS))
        if number is None
        else Thing(kind, colour, 18 + _below(rng, 3), 0, number)
        for kind, colour, number in contents
    ]


def draw_clutter(rng: random.Random, level: Level = STANDARD) -> list[Thing]:
    """Draw the decorations of a scene, without places."""
    least, most = level.clutter
    colours = _pick(rng, COLOURS, 4)  # few enough that some object's colour is its own
    return [
        Thing(
            sprites.DECORATIONS[_below(rng, len(sprites.DECORATIONS))],
            colours[_below(rng, 4)],
            11 + _below(rng, 10),
            _below(rng, sprites.VARIANTS),
        )
        for _ in range(least + _below(rng, most - least + 1))
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


def bucket(contents: Contents, level: Level = STANDARD) -> int:
    """Return the bucket of a scene, a digest of its objects, whatever their positions."""
    named = sorted([f"{kind} {colour} {number}" for kind, colour, number in contents])
    person = f"grip_env {level.name}".encode()[:16]
    return hashlib.blake2b("|".join(named).encode(), digest_size=4, person=person).digest()[0] % BUCKETS


@cache
def _rectangle(height: int, width: int, row: int) -> int:
    """Return the bits of a rectangle with a margin of one pixel, at the top left of a board.

    A row of the board has ``row`` bits.
    """
    return sum(((2 << width) - 1) << (line * row) for line in range(height + 1))


def arrange(
    things: list[Thing], rng: random.Random, taken: int = 0, level: Level = STANDARD
) -> tuple[list[Thing], int] | None:
    """Give every object a place of its own; decorations without room are left out.

    Args:
        things: What to place, in this order.
        rng: Where the draws come from.
        taken: A board of bits, one for each pixel: where there is something already.
        level: How large the scene is.

    Returns:
        The things that were placed, and the board with them; ``None`` if an object found no room.
    """
    placed: list[Thing] = []
    row = level.side + 1
    for thing in things:
        block, decoration = _rectangle(thing.size, thing.width, row), thing.kind in sprites.DECORATIONS
        below, beside = level.side - thing.size + 1, level.side - thing.width + 1
        for _ in range(12 if decoration else 40):
            top, left = int(rng.random() * below), int(rng.random() * beside)
            if not taken >> (top * row + left) & block:
                taken |= block << (top * row + left)
                thing.top, thing.left = top, left
                placed.append(thing)
                break
        else:
            if not decoration:
                return None
    return placed, taken
