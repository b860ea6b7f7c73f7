"""The folder with the configuration, metrics, checkpoints and report of a run."""

from __future__ import annotations

import csv
import json
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from grip_env.common.atomic_files import remove, replace_folder, write_atomically
from grip_env.common.errors import CommandError
from grip_env.run_folder.status import FILE, RunStatus, read_status

__all__ = ["RunFolder", "free_folder", "make_folder", "read_rows", "versions"]


def versions() -> dict[str, str]:
    """Return the versions of the software that results depend on."""
    names = ("grip-env", "torch", "transformers", "gymnasium", "numpy", "pillow", "tokenizers", "safetensors")
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def make_folder(path: Path) -> Path:
    """Create a folder unless it exists, and return it; raise CommandError on failure."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CommandError(f"cannot write to {path}: {reason}; choose another folder") from None
    return path


class RunFolder:
    """The folder with the configuration, metrics, checkpoints and report of a run.

    Args:
        path: The folder; it must be empty or not exist.
        unique: If the folder is taken, append a number to its name instead of failing.

    Raises:
        CommandError: If the folder is taken, or cannot be created.
    """

    def __init__(self, path: Path, unique: bool = False) -> None:
        self.path, count = path, 1
        while not self._claim():
            if not unique:
                raise CommandError(f"{path} already exists: choose another --name, or remove it")
            count += 1
            self.path = path.with_name(f"{path.name}-{count}")
        self._config = ""
        self.status = RunStatus()
        """Status of the run; :meth:`keep` and :meth:`write_status` write it."""

    def _claim(self) -> bool:
        """Create the folder, and return whether it is ours.

        It is not if it has content; of several processes that try at the same time, only one succeeds.
        """
        if not free_folder(self.path):
            return False
        make_folder(self.path)
        try:
            with (self.path / FILE).open("x") as file:
                file.write("{}\n")
        except FileExistsError:
            return False
        except OSError as error:
            raise CommandError(
                f"cannot write to {self.path}: {error.strerror or error}; choose another folder"
            ) from None
        return True

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        """Return the folder of an earlier run, to continue it."""
        run = cls.__new__(cls)
        run.path, run._config = path, (path / "config.json").read_text(encoding="utf-8")
        run.status = read_status(path) or RunStatus()
        return run

    def write_config(self, config: Mapping[str, Any], **more: Any) -> None:
        """Write ``config.json``: the configuration, the command line, versions, and ``more``."""
        import torch

        content = {
            "config": config,
            "command": [Path(sys.executable).name, *sys.argv],
            "versions": versions(),
            "threads": torch.get_num_threads(),
            **more,
        }
        self._config = json.dumps(content, indent=2, default=str) + "\n"
        write_atomically(self.path / "config.json", self._config, durable=True)

    def keep(self, agent: Saves, status: RunStatus, part: str = "agent") -> None:
        """Save an agent atomically in the folder ``part``, with the status if it is "agent".

        If the folder of the run has vanished, it is created again with its ``config.json``.
        """
        if not (self.path / "config.json").is_file():
            write_atomically(self.path / "config.json", self._config, durable=True)
        new = self.path / f"{part}.new"
        remove(new)  # left by a failed attempt
        agent.save(new)
        if not new.exists():  # there was nothing to save
            new.mkdir()
        replace_folder(new, self.path / part)
        if part == "agent":
            self.write_status(status)

    def write_status(self, status: RunStatus) -> None:
        """Write the status of the run."""
        status.write(self.path)
        self.status = status

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """Append a row to ``{phase}.csv``; the values of a phase always have the same names."""
        path = self.path / f"{phase}.csv"
        fresh = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(["step", *values])
            writer.writerow([step, *(f"{value:.6g}" for value in values.values())])


def read_rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """Return the names of a log's columns and its rows, without incomplete or damaged ones."""
    try:
        text = path.read_bytes().decode(errors="replace").replace("\0", " ")
    except OSError:
        return [], []
    whole, end, _ = text.rpartition("\n")  # a last row without a line end is incomplete, and its last number may be cut
    rows: list[list[str]] = []
    names: list[str] | None = None
    for text_of_row in (whole + end).splitlines():  # one at a time, as a quote left open would take in the rows below
        try:
            row = next(csv.reader([text_of_row]), [])
            if names is None:
                names = row
            elif len([float(number) for number in row]) == len(names):
                rows.append(row)
        except (ValueError, csv.Error):  # such as a field of more than 131,072 characters
            continue
    return names or [], rows


class Saves(Protocol):
    """An object that saves itself into a folder."""

    def save(self, folder: Path) -> None:
        """Save it into ``folder``."""
        ...


def free_folder(path: Path) -> bool:
    """Return whether a path is free: it does not exist, or is an empty folder.

    Raises:
        CommandError: If the path cannot be examined.
    """
    try:
        return not path.exists() or (path.is_dir() and not any(path.iterdir()))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CommandError(f"cannot write to {path}: {reason}; choose another folder") from None
