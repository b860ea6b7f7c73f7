"""Question families about scenes: questions, answers, and the things that decide them.

Each family is a function of a scene's things, in the order in which they were placed. A question's premise ("the
circle": there is exactly one) holds over everything in the scene, so that it has one right answer. The families from
``larger`` on need several things together: no single token answers them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations

from grip_env.tasks.scene_layout import Thing

__all__ = ["FAMILIES", "GAP", "NEAR", "PLACED", "Question", "plural"]

GAP = (16, 32)
"""Least and most pixels between the columns of two objects that left/right questions compare."""

NEAR = 1.5
"""How many times as far as the nearest object of a kind the next one must be for the nearest to be "near" a card."""

_MARGIN = 2
"""Largest difference between the counts of two kinds that are compared: further apart, one look would do."""


@dataclass(frozen=True)
class Question:
    """A question about a scene, its answer, and the indices of the things that decide it."""

    family: str
    text: str
    answer: str
    about: tuple[int, ...]


def plural(kind: str) -> str:
    """Return the plural of a shape's name."""
    return kind + ("es" if kind.endswith("s") else "s")


def _by_kind(things: Sequence[Thing]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for index, thing in enumerate(things):
        if thing.is_shape:
            groups.setdefault(thing.kind, []).append(index)
    return dict(sorted(groups.items()))


def _single(things: Sequence[Thing]) -> list[tuple[str, int]]:
    """Return the shapes there is one of, and their indices."""
    return [(kind, group[0]) for kind, group in _by_kind(things).items() if len(group) == 1]


def _signs(things: Sequence[Thing], kind: str) -> list[tuple[int, Thing]]:
    """Return the cards (or plates) that no other shares its colour with, and their indices."""
    found = [(index, thing) for index, thing in enumerate(things) if thing.kind == kind]
    return [(index, thing) for index, thing in found if sum(other.colour == thing.colour for _, other in found) == 1]


def _existence(things: Sequence[Thing]) -> list[Question]:
    asked = []
    shapes = _by_kind(things)
    # absent pairs reuse a shape and a colour that are both there: neither alone gives the answer away
    colours = sorted({things[index].colour for group in shapes.values() for index in group})
    for kind, group in shapes.items():
        for colour in colours:
            matching = tuple(index for index in group if things[index].colour == colour)
            article = "an" if colour[0] in "aeiou" else "a"
            text = f"is there {article} {colour} {kind}?"
            asked.append(Question("existence", text, "yes" if matching else "no", matching or tuple(group)))
    return asked


def _color(things: Sequence[Thing]) -> list[Question]:
    return [
        Question("color", f"what color is the {kind}?", things[index].colour, (index,))
        for kind, index in _single(things)
    ]


def _counting(things: Sequence[Thing]) -> list[Question]:
    return [
        Question("counting", f"how many {plural(kind)} are there?", str(len(group)), tuple(group))
        for kind, group in _by_kind(things).items()
    ]


def _reading(things: Sequence[Thing]) -> list[Question]:
    return [
        Question("reading", f"what digit is on the {thing.colour} card?", str(thing.number), (index,))
        for index, thing in _signs(things, "card")
    ]


def _shape(things: Sequence[Thing]) -> list[Question]:
    used = [thing.colour for thing in things]
    return [
        Question("shape", f"what shape is the {thing.colour} object?", thing.kind, (index,))
        for index, thing in enumerate(things)
        if thing.is_shape and used.count(thing.colour) == 1
    ]


def _relation(things: Sequence[Thing]) -> list[Question]:
    asked = []
    for (kind, index), (other_kind, other) in permutations(_single(things), 2):
        gap = things[index].centre[1] - things[other].centre[1]
        # near in the row: far apart, the place of one object alone would nearly always give the answer
        if GAP[0] <= abs(gap) <= GAP[1]:
            text = f"is the {kind} left or right of the {other_kind}?"
            asked.append(Question("relation", text, "left" if gap < 0 else "right", (index, other)))
    return asked


def _number(things: Sequence[Thing]) -> list[Question]:
    return [
        Question("number", f"what number is on the {thing.colour} plate?", str(thing.number), (index,))
        for index, thing in _signs(things, "plate")
    ]


def _larger(things: Sequence[Thing]) -> list[Question]:
    asked = []
    for (index, one), (other, two) in permutations(_signs(things, "card"), 2):
        if one.number is not None and two.number is not None and one.number != two.number:
            text = f"which card has the larger digit, the {one.colour} or the {two.colour}?"
            larger = one if one.number > two.number else two
            asked.append(Question("larger", text, larger.colour, (index, other)))
    return asked


def _more(things: Sequence[Thing]) -> list[Question]:
    asked = []
    for (kind, group), (other_kind, other) in permutations(_by_kind(things).items(), 2):
        if abs(len(group) - len(other)) <= _MARGIN and len(group) + len(other) > 2:
            text = f"are there more {plural(kind)} than {plural(other_kind)}?"
            asked.append(Question("more", text, "yes" if len(group) > len(other) else "no", (*group, *other)))
    return asked


def _same(things: Sequence[Thing]) -> list[Question]:
    asked = []
    for (index, one), (other, two) in permutations(_signs(things, "card"), 2):
        text = f"do the {one.colour} and the {two.colour} card show the same digit?"
        asked.append(Question("same", text, "yes" if one.number == two.number else "no", (index, other)))
    for (kind, index), (other_kind, other) in permutations(_single(things), 2):
        text = f"are the {kind} and the {other_kind} the same color?"
        asked.append(
            Question("same", text, "yes" if things[index].colour == things[other].colour else "no", (index, other))
        )
    return asked


def _near(things: Sequence[Thing]) -> list[Question]:
    asked = []
    for card, sign in _signs(things, "card"):
        for kind, group in _by_kind(things).items():
            if len({things[index].colour for index in group}) < 2:
                continue
            (nearest, index), (next_one, _) = sorted((_distance(things[index], sign), index) for index in group)[:2]
            if next_one >= NEAR * nearest:
                text = f"what color is the {kind} near the {sign.colour} card?"
                asked.append(Question("near", text, things[index].colour, (card, index)))
    return asked


def _distance(one: Thing, other: Thing) -> float:
    return float(((one.centre[0] - other.centre[0]) ** 2 + (one.centre[1] - other.centre[1]) ** 2) ** 0.5)


def _odd(things: Sequence[Thing]) -> list[Question]:
    asked = []
    for kind, group in _by_kind(things).items():
        colours = [things[index].colour for index in group]
        lonely = [colour for colour in set(colours) if colours.count(colour) == 1]
        if len(group) >= 3 and len(set(colours)) == 2 and len(lonely) == 1:
            text = f"what color is the odd one of the {plural(kind)}?"
            asked.append(Question("odd", text, lonely[0], tuple(group)))
    return asked


FAMILIES: dict[str, Callable[[Sequence[Thing]], list[Question]]] = {
    "existence": _existence,
    "color": _color,
    "counting": _counting,
    "reading": _reading,
    "shape": _shape,
    "relation": _relation,
    "larger": _larger,
    "more": _more,
    "same": _same,
    "near": _near,
    "number": _number,
    "odd": _odd,
}
"""Every question family by its name, as a function from the things of a scene to what can be asked of them."""

PLACED = ("relation", "near")
"""Families that depend on where things are; of the others, the contents of a scene tell what can be asked."""
