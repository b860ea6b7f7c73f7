"""Loading of saved runs for a comparison, and grouping of the seeds of one method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grip_env.common.errors import CommandError
from grip_env.run_folder.config import read_run_config
from grip_env.run_folder.folder import read_rows
from grip_env.run_folder.status import read_status

if TYPE_CHECKING:
    from agents.base import Selector
    from grip_env.vlms.huggingface import HuggingFaceVLM

__all__ = ["Run", "group_runs", "load_agent", "load_run", "read_log"]


@dataclass
class Run:
    """A saved run, as needed for a comparison."""

    path: Path
    saved: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """Configuration of the run."""
        found: dict[str, Any] = self.saved["config"]
        return found

    @property
    def options(self) -> dict[str, Any]:
        """Options of the algorithm; empty for a user-defined class."""
        algo: str = self.config["algo"]
        found: dict[str, Any] = {} if ":" in algo else self.config.get(algo.replace("-", "_"), {})
        return found

    @property
    def label(self) -> str:
        """Name that all seeds of a run share: the algorithm and its deviations from the defaults."""
        algo = self.config["algo"]
        preset, in_turn = self.options.get("preset"), self.options.get("in_turn", False)
        usual = "default" if algo == "grpo" else algo
        notes = [preset] if preset not in (None, usual) else []
        if in_turn != (preset == "default"):  # differs from the preset
            notes.append("in turn" if in_turn else "at once")
        notes += [self.mark] if self.mark else []
        return algo + (f" ({', '.join(notes)})" if notes else "")

    @property
    def mark(self) -> str:
        """Addition to the agent's name in tables; empty if training has finished or has no status."""
        status = read_status(self.path)
        return "" if status is None else status.mark

    def training_cost(self) -> dict[str, float] | None:
        """Return the "seconds" and "forwards" of training from the logs.

        Returns:
            The two numbers, or ``None`` if the logs lack them or training has not finished.
        """
        seconds = forwards = 0.0
        for path in [] if self.mark else sorted(self.path.glob("*.csv")):
            rows = read_log(path)
            if not rows or not {"seconds", "forwards"} <= set(rows[0]):
                return None
            seconds += sum(row["seconds"] for row in rows)
            forwards = max(forwards, rows[-1]["forwards"])  # cumulative
        return {"seconds": seconds, "forwards": forwards} if seconds else None

    def is_another_seed_of(self, others: Sequence[Run]) -> bool:
        """Return whether this is a further seed of ``others``; unfinished runs never are."""
        if self.mark or others[0].mark:
            return False
        seeds = [other.config.get("seed") for other in others]
        return others[0].like(self) and self.config.get("seed") not in seeds

    def like(self, other: Run) -> bool:
        """Return whether two runs have the same configuration, except for seed and environment.

        Options that do not affect training, such as names, folders, threads and device, are ignored.
        """
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
    """Return the rows of the log of a run, without incomplete or damaged rows."""
    names, rows = read_rows(path)
    return [dict(zip(names, map(float, row), strict=True)) for row in rows]


def load_run(path: Path) -> Run:
    """Return the run in a folder.

    Raises:
        CommandError: If the folder holds no readable run.
    """
    from agents.training.options import options_of

    try:
        run = Run(path, read_run_config(path, options_of))
    except (FileNotFoundError, ValueError) as error:
        raise CommandError(str(error)) from None
    run.options.setdefault("in_turn", False)  # for runs from before this option existed
    return run


def load_agent(run: Run, vlm: HuggingFaceVLM, part: str = "agent", algorithm: str | None = None) -> Selector:
    """Return the agent of a run, or its warm-up.

    Args:
        run: The run.
        vlm: The vision-language model of the run.
        part: "agent" or "warmup".
        algorithm: The algorithm whose code may be imported, see :func:`agents.saved.load_saved`.

    Raises:
        CommandError: If there is no trained agent, it cannot be loaded, or the model has other weights.
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
    """Return the paths of the runs by group; the runs of a group differ only in their seed.

    If several groups have the same label, all but the first have the folder of their first run in their name.
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
