"""Procedural scenes with questions, the task that the embedded model is made for.

A scene holds five to seven shapes and two cards with a digit, none touching another, among decorations in the same
colours on a textured background. Six question families mirror the benchmarks of the field: existence, colour,
counting, digit reading, shape, and left/right relation. The premise of a question ("the circle": there is exactly one)
holds for the whole scene, so that every question has exactly one correct answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from grip_env.tasks import scene_layout, scene_questions, sprites
from grip_env.tasks.base import Example, check_index
from grip_env.tasks.scene_layout import Thing
from grip_env.tasks.scene_levels import CELL, COLOURS, LEVELS, STANDARD, Level
from grip_env.tasks.scene_questions import PLACED, Question, plural

__all__ = [
    "CHOICES",
    "COLOURS",
    "FAMILIES",
    "GRID",
    "SIDE",
    "Question",
    "Scene",
    "SceneTask",
    "Thing",
    "coverage",
    "plural",
]

GRID, SIDE, FAMILIES = STANDARD.grid, STANDARD.side, STANDARD.families
CHOICES = {family: STANDARD.choices[family] for family in FAMILIES}
"""Of the standard level: cells of the relevance grid and pixels along a side, question families and their answers."""

_SIZES = {"train": 1_000_000, "validation": 12_000, "test": 12_000}
# A digest of its contents decides the split of a scene, so that no scene is in two splits.
_BUCKETS = {"train": (0, 1, 2), "validation": (3,), "test": (4,)}

_LUMA = np.array([0.3, 0.59, 0.11], dtype=np.float32)
_LIGHT_INK, _DARK_INK = (np.full((3, 1, 1), value, dtype=np.float32) for value in (250, 10))


@dataclass
class Scene:
    """The content of one picture."""

    things: list[Thing]
    texture: int
    level: Level = STANDARD

    def draw(self) -> np.ndarray:
        """Return the picture, uint8 (side, side, 3)."""
        side = self.level.side
        rng = np.random.default_rng(self.texture)
        canvas = sprites.background(rng, side)
        shades = rng.uniform(-12, 12, (len(self.things), 3)).astype(np.float32)
        colours = np.array([sprites.PALETTE[thing.colour] for thing in self.things], dtype=np.float32) + shades
        for thing, colour in zip(self.things, colours[..., None, None], strict=True):
            sprites.composite(canvas, thing.mask, colour, thing.top, thing.left)
            if thing.number is not None:
                dark = _LUMA @ colour[:, 0, 0] < 120
                sprites.composite(canvas, thing.ink, _LIGHT_INK if dark else _DARK_INK, thing.top, thing.left)
        np.clip(canvas, 0, 255, out=canvas)
        picture = np.empty((side * side, 3), dtype=np.uint8)
        for channel, values in enumerate(canvas.astype(np.uint8)):  # several times faster than one transposed copy
            picture[:, channel] = values.reshape(-1)
        return picture.reshape(side, side, 3)

    def coverage(self, index: int) -> np.ndarray:
        """Return the share of each grid cell that thing ``index`` covers, float32 (grid, grid)."""
        return coverage(self.things[index], self.level)

    def relevance(self, about: tuple[int, ...]) -> np.ndarray:
        """Grade the cells that show the things in ``about``: float32 (grid, grid) in [0, 1].

        A cell has a grade above 0 if a thing covers at least a quarter of it, or if it is the best cell of a thing. The
        best cells of all things rank first, then the second-best ones, so that the top of the ranking shows every
        thing.
        """
        grid = self.level.grid
        grade = np.zeros((grid, grid), dtype=np.float32)
        for index in about:
            cover = self.coverage(index)
            order = np.argsort(-cover, axis=None, kind="stable")
            for rank, cell in enumerate(order):
                row, column = divmod(int(cell), grid)
                if rank and cover[row, column] < 0.25:
                    break
                value = (1.0 + 0.5 * float(cover[row, column])) / (1.5 * (1 + rank))
                grade[row, column] = max(grade[row, column], value)
        return grade

    def questions(self, family: str, answer: str | None = None) -> list[Question]:
        """Return the questions of ``family`` about this scene, or those with the given answer."""
        found = scene_questions.FAMILIES[family](self.things)
        return [question for question in found if answer is None or question.answer == answer]


def coverage(thing: Thing, level: Level = STANDARD) -> np.ndarray:
    """Return the share of each grid cell that a thing covers, float32 (grid, grid)."""
    (row, above), (column, before) = divmod(thing.top, CELL), divmod(thing.left, CELL)
    rows, columns = -(-(above + thing.size) // CELL), -(-(before + thing.width) // CELL)
    block = np.zeros((rows * CELL, columns * CELL), dtype=np.float32)  # the cells it touches
    block[above : above + thing.size, before : before + thing.width] = thing.mask
    full = np.zeros((level.grid, level.grid), dtype=np.float32)
    full[row : row + rows, column : column + columns] = block.reshape(rows, CELL, columns, CELL).mean((1, 3))
    return full


class SceneTask:
    """Scenes with one question each.

    Consecutive examples cycle through the question families, so that every split is balanced. The same
    ``(split, index)`` always gives the same example; the contents of a scene decide its split, so that no scene of
    one split can be drawn in another.

    Args:
        families: Which question families to ask, one after another; those of the level if not given.
        level: "standard": 96 x 96 pixels, seven to nine objects. "hard": 128 x 128 pixels, 17 to 19 objects, and
            questions whose evidence is scattered. At the standard level, "larger", "more", "same" and "near" can be
            asked too, if named.

    The same ``(split, index)`` always gives the same example; the contents of a scene decide its split, so that
    no scene of one split can be drawn in another.

    >>> task = SceneTask()
    >>> example = task.example("train", 4)
    >>> example.family, example.image.shape
    ('shape', (96, 96, 3))
    >>> SceneTask(level="hard").example("train", 4).image.shape
    (128, 128, 3)
    """

    splits = ("train", "validation", "test")

    def __init__(self, families: Sequence[str] | None = None, level: str | Level = "standard") -> None:
        if isinstance(level, str) and level not in LEVELS:
            raise ValueError(f"unknown level {level!r}: choose one of {', '.join(LEVELS)}")
        self.level = LEVELS[level] if isinstance(level, str) else level
        self.name = self.level.name
        known = (*self.level.families, *self.level.more_families)
        self.families = self.level.families if families is None else tuple(families)
        unknown = sorted(set(self.families) - set(known))
        if unknown or not self.families:
            raise ValueError(f"unknown question families {unknown}: choose from {', '.join(known)}")

    def size(self, split: str) -> int:
        """Return the number of examples in ``split``."""
        if split not in _SIZES:
            raise ValueError(f"unknown split {split!r} of task {self.name!r}: choose one of {', '.join(self.splits)}")
        return _SIZES[split]

    def example(self, split: str, index: int) -> Example:
        """Return example ``index`` of ``split``."""
        scene, question = self.scene_and_question(split, index)
        return Example(
            image=scene.draw(),
            question=question.text,
            answer=question.answer,
            family=question.family,
            relevance=scene.relevance(question.about),
            key=f"{self.name}/{split}/{index}",
        )

    def scene_and_question(self, split: str, index: int) -> tuple[Scene, Question]:
        """Return the scene that :meth:`example` draws, and the question with its answer."""
        check_index(self, split, index)
        family = self.families[index % len(self.families)]
        rng = random.Random(f"grip_env {self.name}/{split}/{family}/{index}")
        answer = rng.choice(self.level.choices[family])
        while True:
            scene = self.sample_scene(split, rng, family, answer, self.level)
            asked = scene.questions(family, answer) if scene else []
            if scene and asked:
                return scene, rng.choice(asked)

    @staticmethod
    def sample_scene(
        split: str,
        rng: random.Random,
        family: str | None = None,
        answer: str | None = None,
        level: Level = STANDARD,
    ) -> Scene | None:
        """Draw a scene of ``split``, or return ``None`` if the draw fails.

        A draw fails if the scene is of another split, has no room for its things, or does not allow the question.

        Args:
            split: The split the scene must belong to.
            rng: Where the draws come from.
            family: If given, the scene can be asked a question of this family,
            answer: with this answer.
            level: How large and how full the scene is.
        """
        contents = scene_layout.draw_contents(rng, level)
        if family is not None and answer is not None:
            scene_layout.steer(contents, rng, family, answer)
        if scene_layout.bucket(contents, level) not in _BUCKETS[split]:
            return None
        objects, clutter = scene_layout.objects_of(contents, rng), scene_layout.draw_clutter(rng, level)
        # most families depend on the contents alone: look at these before paying for an arrangement
        if family not in (None, *PLACED) and not Scene(objects + clutter, 0).questions(family or "", answer):
            return None
        placed = scene_layout.arrange(objects, rng, level=level)
        if placed is None or (family in PLACED and not Scene(placed[0], 0).questions(family or "", answer)):
            return None
        around = scene_layout.arrange(clutter, rng, placed[1], level)
        return None if around is None else Scene(placed[0] + around[0], rng.getrandbits(32), level)
