"""Procedural scenes with questions, the task that the embedded model is made for.

A scene holds five to seven shapes and two cards with a digit, none touching another, among decorations in the same
colours on a textured background. Six question families mirror the benchmarks of the field: existence, colour,
counting, digit reading, shape, and left/right relation. The premise of a question ("the circle": there is exactly one)
holds for the whole scene, so that every question has exactly one correct answer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from grip_env.tasks import scene_layout, sprites
from grip_env.tasks.base import Example, check_index
from grip_env.tasks.scene_layout import COLOURS, SIDE, Thing

__all__ = ["CHOICES", "FAMILIES", "GRID", "SIDE", "Question", "Scene", "SceneTask", "Thing", "plural"]

GRID = 12
"""Rows and columns of the relevance grid, which has one cell per 8-pixel patch."""

FAMILIES = ("existence", "color", "counting", "reading", "shape", "relation")
GAP = (16, 32)
"""Smallest and largest horizontal distance, in pixels, between the objects of a left/right question."""

CHOICES: dict[str, tuple[str, ...]] = {
    "existence": ("yes", "no"),
    "color": COLOURS,
    "counting": ("1", "2", "3"),
    "reading": tuple("0123456789"),
    "shape": sprites.SHAPES,
    "relation": ("left", "right"),
}
"""Possible answers of each family, which are equally frequent."""

_SIZES = {"train": 1_000_000, "validation": 12_000, "test": 12_000}
# A digest of its contents decides the split of a scene, so that no scene is in two splits.
_BUCKETS = {"train": (0, 1, 2), "validation": (3,), "test": (4,)}

_CELL = SIDE // GRID
_LUMA = np.array([0.3, 0.59, 0.11], dtype=np.float32)
_LIGHT_INK, _DARK_INK = (np.full((3, 1, 1), value, dtype=np.float32) for value in (250, 10))


@dataclass(frozen=True)
class Question:
    """A question about a scene, its answer, and the indices of the things that decide it."""

    family: str
    text: str
    answer: str
    about: tuple[int, ...]


@dataclass
class Scene:
    """The content of one picture."""

    things: list[Thing]
    texture: int

    def draw(self) -> np.ndarray:
        """Draw the picture, uint8 (SIDE, SIDE, 3)."""
        rng = np.random.default_rng(self.texture)
        canvas = sprites.background(rng, SIDE)
        shades = rng.uniform(-12, 12, (len(self.things), 3)).astype(np.float32)
        colours = np.array([sprites.PALETTE[thing.colour] for thing in self.things], dtype=np.float32) + shades
        for thing, colour in zip(self.things, colours[..., None, None], strict=True):
            sprites.composite(canvas, thing.mask, colour, thing.top, thing.left)
            if thing.digit is not None:
                dark = _LUMA @ colour[:, 0, 0] < 120
                ink = sprites.card_masks(thing.digit, thing.size)[1]
                sprites.composite(canvas, ink, _LIGHT_INK if dark else _DARK_INK, thing.top, thing.left)
        np.clip(canvas, 0, 255, out=canvas)
        picture = np.empty((SIDE * SIDE, 3), dtype=np.uint8)
        for channel, values in enumerate(canvas.astype(np.uint8)):  # several times faster than one transposed copy
            picture[:, channel] = values.reshape(-1)
        return picture.reshape(SIDE, SIDE, 3)

    def coverage(self, index: int) -> np.ndarray:
        """Return the share of each grid cell that a thing covers, float32 (GRID, GRID) in [0, 1]."""
        thing = self.things[index]
        (row, above), (column, before) = divmod(thing.top, _CELL), divmod(thing.left, _CELL)
        rows, columns = -(-(above + thing.size) // _CELL), -(-(before + thing.size) // _CELL)
        block = np.zeros((rows * _CELL, columns * _CELL), dtype=np.float32)  # the cells it touches
        block[above : above + thing.size, before : before + thing.size] = thing.mask
        full = np.zeros((GRID, GRID), dtype=np.float32)
        full[row : row + rows, column : column + columns] = block.reshape(rows, _CELL, columns, _CELL).mean((1, 3))
        return full

    def relevance(self, about: tuple[int, ...]) -> np.ndarray:
        """Grade the cells that show the things in ``about``, float32 (GRID, GRID) in [0, 1].

        A cell has a grade above 0 if a thing covers at least a quarter of it, or if it is the best cell of a thing. The
        best cells of all things rank first, then the second-best ones, so that the top of the ranking shows every
        thing.
        """
        grade = np.zeros((GRID, GRID), dtype=np.float32)
        for index in about:
            cover = self.coverage(index)
            order = np.argsort(-cover, axis=None, kind="stable")
            for rank, cell in enumerate(order):
                row, column = divmod(int(cell), GRID)
                if rank and cover[row, column] < 0.25:
                    break
                value = (1.0 + 0.5 * float(cover[row, column])) / (1.5 * (1 + rank))
                grade[row, column] = max(grade[row, column], value)
        return grade

    def questions(self, family: str, answer: str | None = None) -> list[Question]:
        """Return all questions of ``family`` about this scene, or those with the given answer."""
        found = getattr(self, f"_ask_{family}")()
        return [question for question in found if answer is None or question.answer == answer]

    def _by_kind(self) -> dict[str, list[int]]:
        groups: dict[str, list[int]] = {}
        for index, thing in enumerate(self.things):
            if thing.is_shape:
                groups.setdefault(thing.kind, []).append(index)
        return groups

    def _ask_existence(self) -> list[Question]:
        asked = []
        shapes = self._by_kind()
        # absent pairs combine a shape and a colour that are both present: neither alone reveals the answer
        colours = sorted({self.things[index].colour for group in shapes.values() for index in group})
        for kind, group in sorted(shapes.items()):
            for colour in colours:
                matching = tuple(index for index in group if self.things[index].colour == colour)
                article = "an" if colour[0] in "aeiou" else "a"
                text = f"is there {article} {colour} {kind}?"
                asked.append(Question("existence", text, "yes" if matching else "no", matching or tuple(group)))
        return asked

    def _ask_color(self) -> list[Question]:
        return [
            Question("color", f"what color is the {kind}?", self.things[group[0]].colour, tuple(group))
            for kind, group in sorted(self._by_kind().items())
            if len(group) == 1
        ]

    def _ask_counting(self) -> list[Question]:
        return [
            Question("counting", f"how many {plural(kind)} are there?", str(len(group)), tuple(group))
            for kind, group in sorted(self._by_kind().items())
        ]

    def _ask_reading(self) -> list[Question]:
        cards = [(index, thing) for index, thing in enumerate(self.things) if thing.digit is not None]
        return [
            Question("reading", f"what digit is on the {thing.colour} card?", str(thing.digit), (index,))
            for index, thing in cards
            if sum(other.colour == thing.colour for _, other in cards) == 1
        ]

    def _ask_shape(self) -> list[Question]:
        used = [thing.colour for thing in self.things]
        return [
            Question("shape", f"what shape is the {thing.colour} object?", thing.kind, (index,))
            for index, thing in enumerate(self.things)
            if thing.is_shape and used.count(thing.colour) == 1
        ]

    def _ask_relation(self) -> list[Question]:
        single = [(kind, group[0]) for kind, group in sorted(self._by_kind().items()) if len(group) == 1]
        asked = []
        for kind, index in single:
            for other_kind, other in single:
                gap = self.things[index].centre[1] - self.things[other].centre[1]
                # horizontally near: far apart, the place of one object alone would nearly always reveal the answer
                if index != other and GAP[0] <= abs(gap) <= GAP[1]:
                    text = f"is the {kind} left or right of the {other_kind}?"
                    asked.append(Question("relation", text, "left" if gap < 0 else "right", (index, other)))
        return asked


def plural(kind: str) -> str:
    """Return the plural of a shape's name."""
    return kind + ("es" if kind.endswith("s") else "s")


class SceneTask:
    """Scenes with one question each.

    Consecutive examples cycle through the question families, so that every split is balanced. The same
    ``(split, index)`` always gives the same example; the contents of a scene decide its split, so that no scene of
    one split can be drawn in another.

    Args:
        families: The question families, in the order in which they are asked.

    >>> task = SceneTask()
    >>> example = task.example("train", 4)
    >>> example.family, example.image.shape
    ('shape', (96, 96, 3))
    """

    name = "scenes"
    splits = ("train", "validation", "test")

    def __init__(self, families: tuple[str, ...] = FAMILIES) -> None:
        unknown = sorted(set(families) - set(FAMILIES))
        if unknown or not families:
            raise ValueError(f"unknown question families {unknown}: choose from {', '.join(FAMILIES)}")
        self.families = tuple(families)

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
            key=f"scenes/{split}/{index}",
        )

    def scene_and_question(self, split: str, index: int) -> tuple[Scene, Question]:
        """Return the scene of an example, and the question with its answer."""
        check_index(self, split, index)
        family = self.families[index % len(self.families)]
        rng = random.Random(f"grip_env scenes/{split}/{family}/{index}")
        answer = rng.choice(CHOICES[family])
        while True:
            scene = self.sample_scene(split, rng, family, answer)
            asked = scene.questions(family, answer) if scene else []
            if scene and asked:
                return scene, rng.choice(asked)

    @staticmethod
    def sample_scene(
        split: str, rng: random.Random, family: str | None = None, answer: str | None = None
    ) -> Scene | None:
        """Draw a scene of ``split``, or return ``None`` if the draw fails.

        A draw fails if the scene is of another split, has no room for its things, or does not allow the question.

        Args:
            split: The split of the scene.
            rng: The random generator.
            family: If given, the scene allows a question of this family.
            answer: If given as well, the scene allows a question with this answer.
        """
        contents = scene_layout.draw_contents(rng)
        if family is not None and answer is not None:
            scene_layout.steer(contents, rng, family, answer)
        if scene_layout.bucket(contents) not in _BUCKETS[split]:
            return None
        objects, clutter = scene_layout.objects_of(contents, rng), scene_layout.draw_clutter(rng)
        # all questions but left/right depend on the contents alone: check them before the costly placement
        if family is not None and family != "relation" and not Scene(objects + clutter, 0).questions(family, answer):
            return None
        placed = scene_layout.arrange(objects, rng)
        if placed is None or (family == "relation" and not Scene(placed[0], 0).questions(family, answer)):
            return None
        around = scene_layout.arrange(clutter, rng, placed[1])
        return None if around is None else Scene(placed[0] + around[0], rng.getrandbits(32))
