"""Parsing and checking the rows of data files.

A row holds an image, and questions about it with their answers. It is an object in one of two forms:

    {"image": "cat.png", "question": "what is it?", "answer": "a cat"}
    {"image": "cat.png", "conversations": [{"from": "human", "value": "<image>\\nwhat is it?"},
                                           {"from": "gpt", "value": "a cat"}]}

"family" and "split" are optional; other keys are ignored.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from grip_env.tasks.pictures import shown

__all__ = ["LONGEST_TEXT", "SPLITS", "Row", "to_row"]

SPLITS = ("train", "validation", "test")

LONGEST_TEXT = 10_000
"""Largest number of characters in a question or an answer."""

_MARKER = "<image>"  # where LLaVA's files place the image; the adapter inserts the image into the prompt itself
_OTHERS = re.compile(r"<(?:video|audio|image[ _-]?(?:[2-9]|[1-9]\d+)|ImageHere>\s*<ImageHere)>")
_KINDS = {str: "a string", float: "a number", int: "a number", bool: "true or false", list: "a list", dict: "an object"}
_FORM = 'expected an object such as {"image": "cat.png", "question": "what is it?", "answer": "a cat"}'


@dataclass
class Row:
    """The content of one row; not to be used if the row has faults."""

    place: str
    """Location of the row, such as "pets.jsonl:3"."""
    image: Any = None
    """Reference to the image: the path as written, unless the source stores the images itself."""
    turns: list[tuple[str, str]] = field(default_factory=list)
    """Pairs of a question and its answer."""
    family: str = "question"
    split: str | None = None
    """Split given in the row, if any."""
    faults: list[str] = field(default_factory=list)
    fatal: bool = False
    """True if nothing after this row can be read."""


def to_row(value: Any, place: str, faults: list[str] | None = None, image: Any = None) -> Row:
    """Check one row, and return its content with the faults that were found.

    Args:
        value: The row as parsed.
        place: Location of the row.
        faults: Faults found by the parser.
        image: Reference to the image where it is not the row's "image".
    """
    row = Row(place, image, faults=list(faults or ()))
    if not isinstance(value, dict):
        row.faults.append(f"{_FORM}; got {_kind(value)}")
        return row
    if image is None:
        row.image = _image(value, row.faults)
    _check_markers(value, row.faults)
    if "conversations" in value:
        row.turns = _conversations(value["conversations"], row.faults)
    else:
        question = _text(_without_marker(value, "question"), "question", '"question"', row.faults)
        row.turns = [(question, _text(value, "answer", '"answer"', row.faults))]
    if value.get("family") is not None:
        row.family = _text(value, "family", '"family"', row.faults)
    if value.get("split") is not None:
        row.split = value["split"]
        if row.split not in SPLITS:
            given = shown(row.split) if isinstance(row.split, str) else _kind(row.split)
            row.faults.append(f'"split" is {given}: choose one of {", ".join(SPLITS)}')
    return row


def _kind(value: Any) -> str:
    if value != value:
        return "NaN"
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)


def _image(value: dict[str, Any], faults: list[str]) -> str | None:
    key = "images" if "images" in value and "image" not in value else "image"
    image = value.get(key)
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    if "image" in value and value.get("images") not in (None, image, [image]):
        faults.append('"image" and "images" are both given: a question is about one image, give the path of one')
        return None
    if isinstance(image, str) and image.strip():
        return image
    if key not in value:
        faults.append(f'"image" is missing: give the path of an image (the row has {_keys(value)})')
    elif isinstance(image, list):
        faults.append(f'"{key}" is a list of {len(image)}: a question is about one image, give the path of one')
    else:
        given = "empty" if isinstance(image, str) else _kind(image)
        faults.append(f'"{key}" is {given}: give the path of an image')
    return None


def _keys(value: dict[str, Any]) -> str:
    return ", ".join(shown(key, 20) for key in list(value)[:8]) or "no keys"


def _check_markers(value: dict[str, Any], faults: list[str]) -> None:
    """Add a fault if the questions refer to more than the one image of the row."""
    turns = value.get("conversations", [{"value": value.get("question")}])
    turns = turns if isinstance(turns, list) else []
    texts = [turn.get("value") for turn in turns if isinstance(turn, dict)]
    questions = [text for text in texts[::2] if isinstance(text, str)]
    count = sum(text.count(_MARKER) for text in questions)
    if count > 1:
        faults.append(
            f"the marker {_MARKER} appears {count} times, but the row has one image: give it once, or not at all"
        )
    elif count and _MARKER not in questions[0]:
        faults.append(
            f"the marker {_MARKER} is in a later question, so that the first is not about the image: give it in the "
            "first, or not at all"
        )
    other = next(filter(None, map(_OTHERS.search, questions)), None)
    if other is not None:
        faults.append(f"the marker {other[0]} appears, but the row has one image and nothing else: remove it")


def _without_marker(value: dict[str, Any], key: str) -> dict[str, Any]:
    text = value.get(key)
    return value | {key: text.replace(_MARKER, "")} if isinstance(text, str) else value


def _text(value: dict[str, Any], key: str, name: str, faults: list[str]) -> str:
    """Return a text without surrounding white space, or "" if it has a fault."""
    text = value.get(key)
    if key not in value:
        faults.append(f"{name} is missing (the row has {_keys(value)})")
    elif not isinstance(text, str):
        remedy = "give it as text (in JSON: in quotes)" if isinstance(text, int | float) else "give a text"
        faults.append(f"{name} is {_kind(text)}, expected a string: {remedy}")
    else:
        clean = text.strip()
        if any("\ud800" <= letter <= "\udfff" for letter in clean):
            faults.append(f"{name} holds half of a surrogate pair, {shown(clean)}: write whole characters")
        elif not any(letter.isprintable() and not letter.isspace() for letter in clean):
            faults.append(f"{name} is empty: give a text")
        elif len(clean) > LONGEST_TEXT:
            faults.append(f"{name} has {len(clean):,} characters, more than the limit of {LONGEST_TEXT:,}: shorten it")
        elif _MARKER in clean:
            faults.append(f"{name} holds the marker {_MARKER}: remove it")
        else:
            return clean
    return ""


def _conversations(value: Any, faults: list[str]) -> list[tuple[str, str]]:
    if not isinstance(value, list) or not value:
        given = "empty" if value == [] else _kind(value)
        faults.append(f'"conversations" is {given}: expected a list of {{"from": "human" or "gpt", "value": ...}}')
        return []
    texts = []
    for number, turn in enumerate(value):
        speaker = ("human", "gpt")[number % 2]
        name = f'"value" of turn {number + 1} ({speaker})'
        found = turn.get("from") if isinstance(turn, dict) else turn
        if not isinstance(turn, dict) or found != speaker:
            told = shown(found) if isinstance(found, str) else _kind(found)
            faults.append(f'turn {number + 1} of "conversations" is from {told}: "human" and "gpt" take turns')
            return []
        texts.append(_text(turn if number % 2 else _without_marker(turn, "value"), "value", name, faults))
    if len(texts) % 2:
        faults.append('the last turn of "conversations" is from "human": add the turn of "gpt"')
        return []
    return list(zip(texts[::2], texts[1::2], strict=True))
