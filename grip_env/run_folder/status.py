"""The status of a run: its file ``status.json``, and its description in tables and notes."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from grip_env.common.atomic_files import write_atomically

__all__ = ["FILE", "RunStatus", "read_status", "unfinished"]

FILE = "status.json"
STATES = ("running", "interrupted", "failed", "done")


@dataclass(frozen=True)
class RunStatus:
    """The state of a run, and the amount of training of its saved agent."""

    state: str = "running"
    """State of the run: "running" (also after a kill), "interrupted" by a signal, "failed" with an error, "done", or
    "unknown" if the file is damaged."""
    phase: str = ""
    """Training phase of the saved agent; empty while it has its initial weights."""
    step: int = 0
    """Number of steps of that phase that the agent has had."""
    steps: int | None = None
    """Number of steps of the whole phase, if known."""
    reason: str = ""
    """Reason for which the run was stopped, if it was."""

    @property
    def trained(self) -> str:
        """Amount of training of the saved agent, in words."""
        if self.state == "unknown":
            return "an unknown amount of training"
        if not self.phase:
            return "untrained"
        phase = "the warm-up" if self.phase == "warmup" else self.phase
        return f"step {self.step:,}{f' of {self.steps:,}' if self.steps else ''} of {phase}"

    @property
    def mark(self) -> str:
        """Addition to the name of the agent in tables; empty if the run is done."""
        if self.state == "done":
            return ""
        state = {"running": "unfinished"}.get(self.state, self.state)
        if self.state == "unknown":
            return "unknown state"
        return f"{state}, {self.trained}" if not self.phase else f"{state} at {self.trained}"

    def describe(self) -> str | None:
        """Return a sentence about a run that is not done, or ``None`` if it is done."""
        if self.state == "done":
            return None
        if self.state == "unknown":
            return f"{FILE} is damaged, so it is unknown whether the run has finished"
        agent = "its agent is untrained" if not self.phase else f"its agent is that of {self.trained}"
        what = {
            "running": "it has not finished: it is still training, or was killed",
            "interrupted": "it was interrupted",
            "failed": "it failed",
        }[self.state]
        return f"{what}{f' ({self.reason})' if self.reason else ''}; {agent}"

    def write(self, run: Path) -> None:
        """Write the status into the folder of a run."""
        write_atomically(run / FILE, json.dumps(dataclasses.asdict(self), indent=2) + "\n", durable=True)


def read_status(run: Path) -> RunStatus | None:
    """Return the status of the run in a folder, or ``None`` for old runs without a status file."""
    try:
        found = RunStatus(**json.loads((run / FILE).read_text(encoding="utf-8")))
        texts = (found.state, found.phase, found.reason)
        counts = (found.step, 0 if found.steps is None else found.steps)
        if not all(isinstance(text, str) for text in texts) or found.state not in STATES:
            raise ValueError(found.state)
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            raise ValueError(found.step)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, RecursionError):
        return RunStatus("unknown")
    return found


def unfinished(folder: Path) -> str | None:
    """Return a sentence about an unfinished run, or ``None`` if it has finished.

    Args:
        folder: The folder of the run, or of its agent.
    """
    run = folder if (folder / FILE).exists() or folder.name != "agent" else folder.parent
    status = read_status(run)
    described = None if status is None else status.describe()
    return None if described is None else f"about {run}: {described}"
