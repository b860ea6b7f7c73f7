"""Levels of the scenes: how large and how full they are, and what can be asked of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from grip_env.tasks import sprites

__all__ = ["CELL", "COLOURS", "HARD", "LEVELS", "STANDARD", "Level"]

COLOURS = tuple(sprites.PALETTE)

CELL = 8
"""Height and width of a cell of the relevance grid, in pixels: a patch of the embedded models."""


@dataclass(frozen=True)
class Level:
    """Size and contents of scenes, and the questions that can be asked about them."""

    name: str
    """Of the task."""
    side: int
    """Height and width of a scene, in pixels."""
    patterns: tuple[tuple[int, ...], ...]
    """How many shapes there are of each kind in a scene: one of these."""
    cards: int
    """Cards with a digit, of different colours."""
    plates: int
    """Plates with a number of two digits, of different colours."""
    clutter: tuple[int, int]
    """Least and most decorations; those that find no room are left out."""
    families: tuple[str, ...]
    """Question families that are asked unless others are named."""
    more_families: tuple[str, ...]
    """Question families that can be named beside them."""

    @property
    def grid(self) -> int:
        """Rows and columns of the relevance grid, whose cells are the vision tower's patches."""
        return self.side // CELL

    @cached_property
    def choices(self) -> dict[str, tuple[str, ...]]:
        """The possible answers of each family; each is drawn equally often."""
        counts = sorted({count for pattern in self.patterns for count in pattern})
        return {
            "existence": ("yes", "no"),
            "color": COLOURS,
            "counting": tuple(map(str, counts)),
            "reading": tuple("0123456789"),
            "shape": sprites.SHAPES,
            "relation": ("left", "right"),
            "larger": COLOURS,
            "more": ("yes", "no"),
            "same": ("yes", "no"),
            "near": COLOURS,
            "number": tuple(map(str, range(10, 100))),
            "odd": COLOURS,
        }


STANDARD = Level(
    name="scenes",
    side=96,
    patterns=((3, 2, 1, 1), (3, 1, 1, 1), (3, 1, 1), (2, 2, 1, 1), (2, 1, 1, 1), (3, 2, 1, 1)),
    cards=2,
    plates=0,
    clutter=(8, 11),
    families=("existence", "color", "counting", "reading", "shape", "relation"),
    more_families=("larger", "more", "same", "near"),
)

HARD = Level(
    name="scenes-hard",
    side=128,
    patterns=(
        (9, 2, 1, 1),
        (8, 2, 1, 1),
        (7, 3, 1, 1),
        (6, 2, 2, 1, 1),
        (6, 3, 1, 1),
        (5, 4, 2, 1, 1),
        (5, 3, 2, 1, 1),
        (4, 4, 2, 1, 1),
        (4, 3, 3, 1, 1),
        (3, 3, 2, 2, 1, 1),
    ),
    cards=4,
    plates=2,
    clutter=(8, 12),
    families=(
        "existence",
        "color",
        "counting",
        "reading",
        "shape",
        "relation",
        "larger",
        "more",
        "same",
        "near",
        "number",
        "odd",
    ),
    more_families=(),
)

LEVELS = {"standard": STANDARD, "hard": HARD}
"""The levels of the task by name."""
