"""What a command prints: tables and notes for people, one JSON object for programs, or nothing."""

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
    """How the command that runs prints."""

    quiet = False
    json = False
    output: TextIO | None = None
    """Standard output, while what is printed for people goes elsewhere."""


def choose_output(quiet: bool = False, as_json: bool = False) -> None:
    """Decide how a command prints, until :func:`end_output`.

    Args:
        quiet: Print nothing for people, and show no progress. Errors and notes on standard error stay.
        as_json: Print what :func:`print_result` is given on standard output, and what is for people on standard error.
    """
    end_output()
    _Mode.quiet, _Mode.json = quiet, as_json
    if quiet or as_json:
        _Mode.output = sys.stdout
        sys.stdout = open(os.devnull, "w", encoding="utf-8") if quiet else sys.stderr  # noqa: SIM115 (until the end)


def end_output() -> None:
    """Print as Python does from here on."""
    if _Mode.output is not None:
        if _Mode.quiet:
            sys.stdout.close()
        sys.stdout, _Mode.output = _Mode.output, None
    _Mode.quiet = _Mode.json = False


def progress_bar(items: Sequence[_T], what: str) -> Iterable[_T]:
    """Return ``items`` behind a progress bar, which is shown on a terminal unless the command is to be quiet."""
    from tqdm import tqdm

    return tqdm(items, desc=what, leave=False, dynamic_ncols=True, disable=_Mode.quiet or None)


def print_result(content: dict[str, Any]) -> None:
    """Print a command's result as one JSON object, if that was asked for."""
    if _Mode.json and _Mode.output is not None:
        print(json.dumps(content, indent=2, default=str), file=_Mode.output, flush=True)


def say(line: str, error: bool = False) -> None:
    """Print a line, on standard error or output; where nobody can read it any more, go on without."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr if error else sys.stdout, flush=True)


def unread() -> bool:
    """Return whether it is the reader of this process's output that has gone."""
    try:
        sys.stdout.flush()
    except OSError:
        return True
    return False


def quieten() -> None:
    """Let Python not complain at its exit where the output's reader has gone."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except ValueError:  # closed
            pass
