"""Type checks of values read from JSON against the fields of a dataclass."""

from __future__ import annotations

import functools
import json
import math
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

__all__ = ["check_keys", "check_types"]


UNIONS = (Union, types.UnionType)


def check_types(values: Mapping[str, Any], cls: Any, place: str) -> None:
    """Raise ValueError unless values read from JSON have the types of the fields of ``cls``.

    Args:
        values: Values by the names of fields. Fields may be missing; other keys are ignored.
        cls: The dataclass; ``None`` skips the check.
        place: Prefix of the key in messages.
    """
    hints = {} if cls is None else _hints(cls)
    for name, value in values.items():
        if name in hints and not _fits(value, hints[name]):
            raise ValueError(f"{place}{name} is {_shown(value)}, but should be {_described(hints[name])}")


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def check_keys(values: Any, kinds: Mapping[str, type], place: str) -> None:
    """Raise ValueError unless ``values`` is a JSON object with these keys and types."""
    if not isinstance(values, dict):
        raise ValueError(f"{place.rstrip('.') or 'it'} is {_shown(values)}, but should be an object")
    for name, kind in kinds.items():
        if name not in values:
            raise ValueError(f"{place}{name} is missing")
        if type(values[name]) is not kind:
            raise ValueError(f"{place}{name} is {_shown(values[name])}, but should be {_described(kind)}")


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin is Annotated:
        return _fits(value, get_args(hint)[0])
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if origin in UNIONS:
        return any(_fits(value, part) for part in get_args(hint))
    if hint is float:  # JSON may write 1.0 as 1, and may hold integers too large for a float
        return type(value) is float or (type(value) is int and abs(value) <= sys.float_info.max)
    if hint is Path:
        return type(value) is str and bool(value)
    return type(value) is hint if isinstance(hint, type) else True  # True does not count as an int


def _described(hint: Any) -> str:
    origin = get_origin(hint)
    if origin is Annotated:
        return _described(get_args(hint)[0])
    if origin is Literal:
        return " or ".join(json.dumps(choice) for choice in get_args(hint))
    if origin in UNIONS:
        return " or ".join(_described(part) for part in get_args(hint))
    names = {dict: "an object", str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
    return "null" if hint is type(None) else "a path" if hint is Path else names.get(hint, str(hint))


def _shown(value: Any) -> str:
    """Return a value in JSON notation, shortened if it is long."""
    if isinstance(value, dict | list) and value:
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and not isinstance(value, bool) and value and math.log10(abs(value)) > 30:
        return "a number of more than 30 digits"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
