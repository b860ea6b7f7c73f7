"""Where one run keeps its configuration, metrics, checkpoints and report."""

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
from grip_env.run_folder.status import FILE, RunStatus

__all__ = ["RunFolder", "free_folder", "make_folder", "versions"]


def versions() -> dict[str, str]:
    """Return the versions a result depends on."""
    names = ("grip-env", "torch", "transformers", "gymnasium", "numpy", "pillow", "tokenizers", "safetensors")
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def make_folder(path: Path) -> Path:
    """Create a folder if it is not there, or stop with one line; returns it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CommandError(f"cannot write to {path}: {reason}; choose another folder") from None
    return path


class RunFolder:
    """Where one run keeps its configuration, metrics, checkpoints and report.

    Args:
        path: The folder; it must not hold another run.
        unique: Take another name, with a number at its end, if there is one.

    Raises:
        CommandError: If there is one, or the folder cannot be made.
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
        """How far it has come; :meth:`keep` writes it."""

    def _claim(self) -> bool:
        """Make the folder, unless it has something in it; of several that try at once, one does."""
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

    def write_config(self, config: Mapping[str, Any], **more: Any) -> None:
        """Write ``config.json``: the full configuration, the command line, versions, and anything else given."""
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
        """Save an agent in the folder ``part``, whole or not at all, and how far the run has come with it.

        A folder that has vanished meanwhile is made anew, with its ``config.json``.
        """
        if not (self.path / "config.json").is_file():
            write_atomically(self.path / "config.json", self._config, durable=True)
        new = self.path / f"{part}.new"
        remove(new)  # of an attempt that failed
        agent.save(new)
        if not new.exists():  # there was nothing to save
            new.mkdir()
        replace_folder(new, self.path / part)
        if part == "agent":
            self.write_status(status)

    def write_status(self, status: RunStatus) -> None:
        """Write how far the run has come."""
        status.write(self.path)
        self.status = status

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """Append a row to ``{phase}.csv``; a phase always logs the same values."""
        path = self.path / f"{phase}.csv"
        fresh = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(["step", *values])
            writer.writerow([step, *(f"{value:.6g}" for value in values.values())])


class Saves(Protocol):
    """Anything that writes itself into a folder."""

    def save(self, folder: Path) -> None:
        """Do so."""
        ...


def free_folder(path: Path) -> bool:
    """Return whether a folder could be made here, or is there with nothing in it; stop with one line on a bad path."""
    try:
        return not path.exists() or (path.is_dir() and not any(path.iterdir()))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CommandError(f"cannot write to {path}: {reason}; choose another folder") from None
