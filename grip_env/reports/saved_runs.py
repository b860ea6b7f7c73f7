"""Runs on disk: what a comparison needs to know of them, and which of them differ by their seed alone."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grip_env.common.errors import CommandError
from grip_env.run_folder.config import read_run_config
from grip_env.run_folder.status import read_status

if TYPE_CHECKING:
    from agents.base import Selector
    from grip_env.vlms.huggingface import HuggingFaceVLM

__all__ = ["Run", "group_runs", "load_agent", "load_run", "read_log"]


@dataclass
class Run:
    """A run, as far as a comparison needs it."""

    path: Path
    saved: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """Its configuration."""
        found: dict[str, Any] = self.saved["config"]
        return found

    @property
    def options(self) -> dict[str, Any]:
        """Those of its algorithm; none where that is a class of the user's own."""
        algo: str = self.config["algo"]
        found: dict[str, Any] = {} if ":" in algo else self.config.get(algo.replace("-", "_"), {})
        return found

    @property
    def label(self) -> str:
        """What runs that differ by their seed alone have in common: the algorithm, and where it is not the default."""
        algo = self.config["algo"]
        preset, in_turn = self.options.get("preset"), self.options.get("in_turn", False)
        usual = "default" if algo == "grpo" else algo
        notes = [preset] if preset not in (None, usual) else []
        if in_turn != (preset == "default"):  # as the preset has it
            notes.append("in turn" if in_turn else "at once")
        notes += [self.mark] if self.mark else []
        return algo + (f" ({', '.join(notes)})" if notes else "")

    @property
    def mark(self) -> str:
        """What tables add to the name of its agent; nothing where training has finished, or nobody knows."""
        status = read_status(self.path)
        return "" if status is None else status.mark

    def training_cost(self) -> dict[str, float] | None:
        """Return the "seconds" and "forwards" its logs tell of; ``None`` if they do not, or it has not finished."""
        seconds = forwards = 0.0
        for path in [] if self.mark else sorted(self.path.glob("*.csv")):
            rows = read_log(path)
            if not rows or not {"seconds", "forwards"} <= set(rows[0]):
                return None
            seconds += sum(row["seconds"] for row in rows)
            forwards = max(forwards, rows[-1]["forwards"])  # counted from the beginning on
        return {"seconds": seconds, "forwards": forwards} if seconds else None

    def is_another_seed_of(self, others: Sequence[Run]) -> bool:
        """Return whether it is one more seed of others; a run that has not finished is not."""
        if self.mark or others[0].mark:
            return False
        seeds = [other.config.get("seed") for other in others]
        return others[0].like(self) and self.config.get("seed") not in seeds

    def like(self, other: Run) -> bool:
        """Return whether the two differ by nothing but their seed, and where and when they were made."""
        beside = (
            "seed",
            "name",
            "runs",
            "threads",
            "progress",
            "picture_every",
            "examples",
            "report_examples",
            "device",
            "cache",
        )
        ours, theirs = ({key: run.config[key] for key in run.config if key not in beside} for run in (self, other))
        return ours == theirs


def read_log(path: Path) -> list[dict[str, float]]:
    """Return the rows of a log that a run wrote; rows that are cut off or otherwise damaged are left out."""
    try:
        text = path.read_bytes().decode(errors="replace").replace("\0", " ")
    except OSError:
        return []
    whole, end, _ = text.rpartition("\n")  # a last row without an end was cut: its last number may be, too
    rows = []
    lines = csv.reader((whole + end).splitlines())
    names = next(lines, [])
    for line in lines:
        try:
            rows.append(dict(zip(names, map(float, line), strict=True)))
        except ValueError:
            continue
    return rows


def load_run(path: Path) -> Run:
    """Return the run in a folder, or stop and say what is wrong."""
    from agents.training.options import options_of

    try:
        run = Run(path, read_run_config(path, options_of))
    except (FileNotFoundError, ValueError) as error:
        raise CommandError(str(error)) from None
    run.options.setdefault("in_turn", False)  # in runs made before there was a choice
    return run


def load_agent(run: Run, vlm: HuggingFaceVLM, part: str = "agent", algorithm: str | None = None) -> Selector:
    """Return the agent of a run, or its warm-up, or stop and say what is wrong.

    Args:
        run: The run.
        vlm: Its model.
        part: "agent" or "warmup".
        algorithm: Whose code may be imported, see :func:`agents.saved.load_saved`.
    """
    from agents.saved import load_saved

    if vlm.checksum() != run.saved["vlm"]["checksum"]:
        raise CommandError(
            f"the agent in {run.path} was trained on a vision-language model with other weights than "
            f"{run.config['vlm']!r} has now: train an agent for this one"
        )
    try:
        return load_saved(run.path, run.saved, vlm, algorithm, part)
    except FileNotFoundError as error:
        raise CommandError(f"{run.path} has no trained agent yet: {error}") from None
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from None


def group_runs(runs: Sequence[Run]) -> Mapping[str, list[str]]:
    """Return the paths of the runs in groups that differ by their seed alone, by a name for each.

    Where the algorithm names several groups, all but the first have their first run's folder in their name as well.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        name = next((name for name, members in groups.items() if run.is_another_seed_of(members)), None)
        if name is None:
            name = run.label if run.label not in groups else f"{run.label} [{run.path.name}]"
            if name in groups:
                name = f"{run.label} [{run.path}]"
            groups[name] = []
        groups[name].append(run)
    return {
        f"{name}, {len(members)} seeds" if len(members) > 1 else name: [str(run.path) for run in members]
        for name, members in groups.items()
    }
