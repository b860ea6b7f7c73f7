"""Conversion of command-line arguments from common notations to that of tyro."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

__all__ = ["plain_arguments"]


def _kinds(config: Any, before: str = "") -> dict[str, Any]:
    """Return the types of all fields, nested ones included, by the names of their options."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(config).items():
        option = before + name.replace("_", "-")
        found |= _kinds(hint, f"{option}.") if dataclasses.is_dataclass(hint) else {option: hint}
    return found


_NO_PATHS = (str, tuple[str, ...], tuple[int, ...], tuple[float, ...])
"""Options behind whose values a run's folder may follow: it cannot be one more of them."""


def _is_run(argument: str) -> bool:
    return (Path(argument) / "config.json").is_file()


def plain_arguments(given: Sequence[str], config: Any, lists: Collection[str] = ()) -> list[str]:
    """Convert command-line arguments to the notation of tyro.

    Several values are separated by spaces instead of commas, and booleans become flags without a value.

    Args:
        given: The arguments as typed.
        config: A dataclass whose fields are the options.
        lists: Names of text options that hold comma-separated lists; spaces are accepted as separators, too.
    """
    kinds = _kinds(config)
    found: list[str] = []
    option = ""
    runs: list[str] = []
    for argument in given:
        if argument.startswith("--"):
            option, found = argument[2:].replace("_", "-"), [*found, argument]
        elif (kinds.get(option) is bool or bool in get_args(kinds.get(option))) and argument.lower() in (
            "true",
            "false",
        ):
            prefix, _, name = option.rpartition(".")
            found[-1] = f"--{prefix}{'.' * bool(prefix)}{'no-' * (argument.lower() == 'false')}{name}"
            option = ""
        elif _is_run(argument) and found and not found[-1].startswith("--") and kinds.get(option) in _NO_PATHS:
            runs.append(argument)
        elif option in lists and not found[-1].startswith("--"):
            found[-1] = ",".join([found[-1].rstrip(","), argument.lstrip(",")])
        elif get_origin(kinds.get(option)) is tuple:
            found += [part for part in argument.split(",") if part]
        else:
            found.append(argument)
    return [*runs, *found]
