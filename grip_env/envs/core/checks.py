"""Checks of arguments, actions, seeds and reset options, which raise ValueError."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np

__all__ = ["MOST", "as_numbers", "as_options", "as_seed", "check_flag", "check_whole", "is_real", "is_whole"]


MOST = 1_000_000
"""Largest accepted number of tokens or environments; above it, an error is raised before memory runs out."""

_NO_NUMBERS = (bool, np.timedelta64)  # registered as numbers by Python or NumPy, but not meant as such


def is_whole(value: Any) -> bool:
    """Return whether a value is a Python or NumPy integer, other than True and False."""
    return isinstance(value, Integral) and not isinstance(value, _NO_NUMBERS)


def is_real(value: Any) -> bool:
    """Return whether a value is a real number that fits in a float, other than True and False."""
    if not isinstance(value, Real) or isinstance(value, _NO_NUMBERS):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raise ValueError unless ``value`` is a whole number, from ``least`` to ``most``."""
    if not is_whole(value):
        raise ValueError(f"{name} must be a whole number, at least {least}; got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")
    if most is not None and value > most:
        raise ValueError(f"{name} must be at most {most:,}; got {value}")


def check_flag(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False; got {value!r}")


def as_seed(seed: Any) -> int | None:
    """Return a seed as a Python int, the only type that Gymnasium accepts, or ``None``.

    Raises:
        ValueError: If it is not a whole number, at least 0.
    """
    if seed is None:
        return None
    if not is_whole(seed) or seed < 0:
        raise ValueError(f"a seed is a whole number, at least 0; got {seed!r}")
    return int(seed)


def as_options(options: Any, known: tuple[str, ...]) -> dict[str, Any]:
    """Return the options of a reset as a dict.

    Raises:
        ValueError: If they are not a mapping, or one of them is unknown.
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise ValueError(f"the options of a reset are a dict with {' and '.join(known)}; got {options!r}")
    unknown = sorted(set(options) - set(known), key=str)
    if unknown:
        raise ValueError(f"unknown reset options {unknown}: the options are {', '.join(known)}")
    return dict(options)


def as_numbers(action: Any, kinds: str, expected: str) -> np.ndarray:
    """Return an action as an array.

    Args:
        action: The output of a policy.
        kinds: Allowed kinds of dtype, by NumPy's letters: "b" bool, "i" and "u" integers, "f" floats.
        expected: Description of a valid action, for the message.

    Raises:
        ValueError: If it is not an array of such numbers, or part of it is masked.
    """
    if np.ma.is_masked(action):
        raise ValueError(f"the action has masked entries, expected {expected}: fill them in")
    try:
        given = np.asarray(action)
    except Exception as error:  # tensors raise three kinds of exceptions, and lists of tensors yet others
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"the action, a {type(action).__name__}, cannot be read as an array ({reason}); expected {expected}: of a "
            "tensor, give action.detach().cpu().numpy()"
        ) from None
    if given.dtype.kind not in kinds:
        raise ValueError(f"the action is of dtype {given.dtype}, expected {expected}")
    return given
