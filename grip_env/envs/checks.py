"""What environments ask of arguments and actions, each with one message."""

from __future__ import annotations

from numbers import Integral
from typing import Any

__all__ = ["check_whole", "is_whole"]


def is_whole(value: Any) -> bool:
    """Tell whether a value is a whole number, of Python or NumPy; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_whole(name: str, value: Any, least: int) -> None:
    """Raise ValueError unless ``value`` is a whole number, at least ``least``."""
    if not is_whole(value) or value < least:
        raise ValueError(f"{name} must be a whole number, at least {least}; got {value!r}")
