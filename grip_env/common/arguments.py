"""Conversion of command-line arguments from common notations to that of tyro."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import tyro

from grip_env.common.errors import CommandError

__all__ = ["check_paths", "plain_arguments", "shortened"]


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
    try:
        return (Path(argument) / "config.json").is_file()
    except (OSError, ValueError):  # a text that is no path, such as a long question
        return False


def shortened(text: str) -> str:
    """Quote the first 40 characters of a text for a message."""
    return repr(text if len(text) <= 40 else text[:40] + "...")


_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP)
"""Errors of paths that do not exist; commands say so themselves, or create them."""


def check_paths(config: Any) -> None:
    """Stop with an error if the system cannot look up a path among the options.

    Names of more than 255 bytes are the usual reason.
    """
    hints = get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for path in value if isinstance(value, tuple) else (value,):
            if not isinstance(path, Path):
                continue
            try:
                os.stat(path)
            except (OSError, ValueError) as error:
                if isinstance(error, OSError) and error.errno in _ABSENT:
                    continue
                reason = getattr(error, "strerror", None) or error
                positional = tyro.conf.Positional in getattr(hints[field.name], "__metadata__", ())
                option = "the run" if positional else f"--{field.name.replace('_', '-')}"
                raise CommandError(
                    f"{option}: {shortened(str(path))} cannot be used as a path ({reason}): choose another"
                ) from None


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
