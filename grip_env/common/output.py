"""Output of commands: tables and notes for people, a JSON object for programs, or nothing."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO, TypeVar

__all__ = ["choose_output", "end_output", "print_result", "progress_bar", "quieten", "say", "unread"]

_T = TypeVar("_T")


class _Mode:
    """Output settings of the running command."""

    quiet = False
    json = False
    output: TextIO | None = None
    """The real standard output while ``sys.stdout`` is redirected."""


def choose_output(quiet: bool = False, as_json: bool = False) -> None:
    """Set the output of a command until :func:`end_output` is called.

    Args:
        quiet: Print nothing for people, and show no progress. Errors and notes on standard error remain.
        as_json: Print the argument of :func:`print_result` on standard output, and all else on standard error.
    """
    end_output()
    _Mode.quiet, _Mode.json = quiet, as_json
    if quiet or as_json:
        _Mode.output = sys.stdout
        sys.stdout = open(os.devnull, "w", encoding="utf-8") if quiet else sys.stderr  # noqa: SIM115 (until the end)


def end_output() -> None:
    """Restore the normal output of Python."""
    if _Mode.output is not None:
        if _Mode.quiet:
            sys.stdout.close()
        sys.stdout, _Mode.output = _Mode.output, None
    _Mode.quiet = _Mode.json = False


def progress_bar(items: Sequence[_T], what: str) -> Iterable[_T]:
    """Wrap ``items`` in a progress bar, shown on a terminal unless the command is quiet."""
    from tqdm import tqdm

    return tqdm(items, desc=what, leave=False, dynamic_ncols=True, disable=_Mode.quiet or None)


def print_result(content: dict[str, Any]) -> None:
    """Print the result of a command as one JSON object, if JSON output is on."""
    if _Mode.json and _Mode.output is not None:
        print(json.dumps(content, indent=2, default=str), file=_Mode.output, flush=True)


def say(line: str, error: bool = False) -> None:
    """Print a line on standard output or standard error, ignoring a closed stream."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr if error else sys.stdout, flush=True)


def unread() -> bool:
    """Return whether the reader of this process's standard output has gone."""
    try:
        sys.stdout.flush()
    except OSError:
        return True
    return False


def quieten() -> None:
    """Prevent an error message at exit if the reader of the output has gone."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except ValueError:  # closed
            pass
