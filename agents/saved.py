"""Loading the agents of saved runs.

Code that is named in a run's files is imported only if the user names it as well.
"""

from __future__ import annotations

import contextlib
import filecmp
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from agents.agent import Agent, as_selector, find_algorithm
from agents.base import Selector
from grip_env.common.atomic_files import folder_on_disk
from grip_env.common.plugins import importable_from_here
from grip_env.run_folder.config import consent_needed
from grip_env.vlms.base import FrozenVLM

__all__ = ["folder_of", "load_saved"]


def load_saved(
    folder: Path,
    saved: Mapping[str, Any],
    vlm: FrozenVLM,
    algorithm: str | type | None = None,
    part: str = "agent",
) -> Selector:
    """Load the agent of a run, ready to choose tokens.

    Args:
        folder: Folder of the run.
        saved: Its ``config.json``; see :func:`~grip_env.run_folder.config.read_run_config`.
        vlm: The model.
        algorithm: The user-defined class that trained the agent, or its name as in the run: "package.module:Class".
            Without it, no code named by the run is imported.
        part: "agent" or "warmup".

    Raises:
        FileNotFoundError: If the run has no such agent.
        ValueError: If the agent is damaged, was made for another model, or is of a class other than ``algorithm``.
    """
    name: str = saved["config"]["algo"]
    if ":" not in name:
        if algorithm not in (None, name):
            raise ValueError(
                f"the agent in {folder} was trained with {name!r}, and not with {algorithm!r}: leave it out"
            )
        return as_selector(find_algorithm(name).load(folder_on_disk(folder / part), vlm))
    place = saved.get("algorithm", {}).get("folder")
    if algorithm is None or (isinstance(algorithm, str) and algorithm != name):
        given = "" if algorithm is None else f", which is not {algorithm!r}"
        raise ValueError(
            f"{consent_needed(folder, saved)}{given}: if you trust it, give --algo {name} (in Python: "
            f"algorithm={name!r})"
        )
    with _importable(name, place):
        found = _checked(algorithm) if isinstance(algorithm, type) else find_algorithm(name)
        try:
            return as_selector(found.load(folder_on_disk(folder / part), vlm))
        except (FileNotFoundError, ValueError):
            raise
        except Exception as error:  # a user-defined class may raise anything
            reason = " ".join(str(error).split())
            raise ValueError(f"{name} cannot load {folder / part} ({type(error).__name__}: {reason})") from error


def folder_of(name: str) -> str | None:
    """Return the folder that "package.module:Class" was imported from, or ``None`` if unknown."""
    module = name.partition(":")[0] if ":" in name else ""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return None
    path = Path(file).absolute()
    return str(path.parents[module.count(".") + (path.stem == "__init__")])


def _checked(algorithm: type) -> type[Agent]:
    if not callable(getattr(algorithm, "load", None)):
        raise ValueError(f"{algorithm!r} cannot load an agent: give the class that trained it, see agents.agent.Agent")
    return algorithm


@contextlib.contextmanager
def _importable(name: str, place: str | None) -> Iterator[None]:
    """Make a class importable inside the context.

    It is imported from Python's path or the working directory, or else from its folder at training time.

    Raises:
        ValueError: If its module is in none of these places.
    """
    package = name.partition(":")[0].partition(".")[0]
    with importable_from_here():
        try:
            here = importlib.util.find_spec(package)
        except (ImportError, ValueError):  # an invalid module name, which find_algorithm reports
            place = here = None
        there = PathFinder.find_spec(package, [place]) if place and Path(place).is_absolute() else None
        if here is None and there is None and place is not None:
            raise ValueError(
                f"cannot import {name!r}: there is no module {package!r} here, nor in {place}, where it was when the "
                "agent was trained: set PYTHONPATH to its folder"
            )
        if here is not None and there is not None and not _same(here.origin, there.origin):
            print(f"note: {name} is read from {here.origin}, and was {there.origin} in training", file=sys.stderr)
        with importable_from_here(str(place)) if here is None and there is not None else contextlib.nullcontext():
            yield


def _same(one: str | None, other: str | None) -> bool:
    """Return whether two Python files have the same content; ``None`` stands for no file."""
    try:
        return one == other or (one is not None and other is not None and filecmp.cmp(one, other, shallow=False))
    except OSError:
        return False
