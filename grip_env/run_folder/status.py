"""How far a run has come: what ``status.json`` in its folder says, and what tables and notes say of it."""

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
    """The state of a run, and how much training its saved agent has had."""

    state: str = "running"
    """"running", also after a kill that left no time to say so; "interrupted" by a signal; "failed" with an error;
    "done"; or "unknown", where the file is damaged."""
    phase: str = ""
    """The phase of training that the saved agent comes from; empty while it has its initial weights."""
    step: int = 0
    """Steps of that phase that it has had."""
    steps: int | None = None
    """Steps of the whole phase, if known."""
    reason: str = ""
    """What stopped the run, if it was stopped."""

    @property
    def trained(self) -> str:
        """How much training the saved agent has had, in words."""
        if self.state == "unknown":
            return "untold training"
        if not self.phase:
            return "untrained"
        phase = "the warm-up" if self.phase == "warmup" else self.phase
        return f"step {self.step:,}{f' of {self.steps:,}' if self.steps else ''} of {phase}"

    @property
    def mark(self) -> str:
        """What tables add to the name of an agent of such a run; nothing to that of one that is done."""
        if self.state == "done":
            return ""
        state = {"running": "unfinished"}.get(self.state, self.state)
        if self.state == "unknown":
            return "unknown state"
        return f"{state}, {self.trained}" if not self.phase else f"{state} at {self.trained}"

    def describe(self) -> str | None:
        """Return a sentence about a run that is not done, ``None`` for one that is."""
        if self.state == "done":
            return None
        if self.state == "unknown":
            return f"{FILE} is damaged, so nobody knows whether it has finished"
        agent = "its agent is untrained" if not self.phase else f"its agent is that of {self.trained}"
        what = {
            "running": "it has not finished: it is still training, or was killed",
            "interrupted": "it was interrupted",
            "failed": "it failed",
        }[self.state]
        return f"{what}{f' ({self.reason})' if self.reason else ''}; {agent}"

    def write(self, run: Path) -> None:
        """Write it into the folder of a run."""
        write_atomically(run / FILE, json.dumps(dataclasses.asdict(self), indent=2) + "\n", durable=True)


def read_status(run: Path) -> RunStatus | None:
    """Return how far the run in a folder has come; ``None`` for runs made before there were such files."""
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
    """Return a sentence about a folder, of a run or of its agent, whose training has not finished; else ``None``."""
    run = folder if (folder / FILE).exists() or folder.name != "agent" else folder.parent
    status = read_status(run)
    described = None if status is None else status.describe()
    return None if described is None else f"about {run}: {described}"
