"""A training while it runs: its logs, checkpoints and snapshots, and its end."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from grip_env.common import stopping
from grip_env.common.atomic_files import remove, write_atomically
from grip_env.common.errors import CommandError
from grip_env.common.output import quieten, say, unread
from grip_env.run_folder.config import Config
from grip_env.run_folder.folder import RunFolder
from grip_env.run_folder.snapshots import keep_snapshot, rewind_logs
from grip_env.run_folder.status import RunStatus

if TYPE_CHECKING:
    from tqdm import tqdm

    from grip_env.vlms.base import Encoded
    from grip_env.vlms.huggingface import HuggingFaceVLM

__all__ = ["LiveRun", "can_resume"]

Report: TypeAlias = "Callable[[Any], object]"
"""Compares a selector with other methods, and writes the tables."""


def can_resume(agent: Any) -> bool:
    """Return whether the training of an agent, or of a class of agents, can be resumed."""
    return all(callable(getattr(agent, name, None)) for name in ("snapshot", "restore"))


class LiveRun:
    """Training of an agent and its run's folder, with signals deferred unless stated otherwise."""

    def __init__(self, config: Config, run: RunFolder, agent: Any, vlm: HuggingFaceVLM, report: Report) -> None:
        from agents.agent import as_selector
        from agents.learning import Metrics

        self.config, self.run, self.agent, self.vlm = config, run, agent, vlm
        self.selector: Any = as_selector(agent)
        self._compare = report
        self.last = Metrics("start", 0)
        self.shown: Encoded | None = None
        """Examples whose kept tokens are drawn while the agent trains."""
        self.steps: dict[str, int] = {}
        """Number of steps taken in each phase, in their order."""
        self._snapshot_at = time.monotonic()
        self.bars: dict[str, tqdm[Any]] = {}
        self.over = False
        """True once training is finished and the agent is saved."""
        self.broken_update = False
        """True if an update of the weights may be incomplete."""

    def status(self, state: str = "running", reason: str = "") -> RunStatus:
        """Return the progress of the agent in memory."""
        if self.last.phase == "start":
            return RunStatus(state, reason=reason)
        total = self.phases.get(self.last.phase)
        return RunStatus(state, self.last.phase, self.last.step + 1, total, reason)

    @property
    def phases(self) -> dict[str, int]:
        """Number of steps of each phase, empty if the agent does not define them."""
        return getattr(self.agent, "phases", {})

    def keep(self, part: str = "agent") -> None:
        """Save the agent in its current state."""
        self.run.keep(self.agent, self.status(), part)

    def take_snapshot(self) -> None:
        """Save the state of the training, from which it can be resumed, if the agent supports that."""
        self._snapshot_at = time.monotonic()
        if can_resume(self.agent) and self.steps:
            import torch

            from agents.training.snapshot import Snapshot

            random = Snapshot({"state": torch.get_rng_state()}, {})
            whole = Snapshot.join({"agent": self.agent.snapshot(), "random": random}, steps=self.steps)
            keep_snapshot(self.run.path, sum(self.steps.values()), whole.write)

    def go_on(self, steps: Mapping[str, int]) -> None:
        """Continue after the steps that the restored agent has had, with logs that end there."""
        from agents.learning import Metrics

        self.steps = dict(steps)
        phase = list(self.steps)[-1]
        self.last = Metrics(phase, self.steps[phase] - 1)
        rewind_logs(self.run.path, self.steps)
        self.keep()

    def learn(self, shown: Encoded) -> None:
        """Train to the end, logging each step and saving checkpoints."""
        from grip_env.reports.plots import draw_gallery
        from grip_env.run_folder.tensorboard import Board

        averages: dict[str, float] = {}
        self.shown = shown

        def checkpoint(step: int) -> None:
            self.keep()
            title = f"What the agent keeps, step {step}"
            board.picture(
                "kept tokens",
                stopping.patiently(lambda: draw_gallery(self.vlm, shown, self.selector, title=title)),
                step,
            )
            board.flush()  # what was logged before a snapshot must not be lost
            self.take_snapshot()

        first = self.last
        with Board(self.run.path) as board, stopping.whole_updates() as updating:
            try:
                steps = iter(self.agent.learn())
                while (metrics := stopping.patiently(lambda: next(steps, None))) is not None:
                    if metrics.phase not in self.bars:
                        averages.clear()
                        self._open_bar(metrics.phase)
                    last = self.last = metrics
                    self.steps[last.phase] = last.step + 1
                    self.run.log(last.phase, last.step, last.values)
                    for key, value in last.values.items():
                        board.scalar(f"{last.phase}/{key}", value, last.step)
                        averages[key] = 0.9 * averages.get(key, value) + 0.1 * value
                    self._update_bar(last.phase, averages)
                    if last.phase == "warmup":
                        if last.step + 1 == self.phases.get("warmup"):
                            self.keep("warmup")  # now, as the next step already updates on a reward
                            checkpoint(0)
                    elif (last.step + 1) % self.config.picture_every == 0:
                        checkpoint(last.step + 1)
                    if time.monotonic() - self._snapshot_at > 60 * self.config.checkpoint_minutes:
                        self.keep()
                        board.flush()
                        self.take_snapshot()
                    stopping.check()
            finally:
                self.broken_update = updating()
                self._close_bars()
            rest = (self.last.step + 1) % self.config.picture_every
            if self.last is not first and self.last.phase != "warmup" and rest:
                checkpoint(self.last.step + 1)

    def report(self) -> None:
        """Mark the run as done, and compare the agent with other methods."""
        self.run.write_status(self.status("done"))
        self.over = True
        with stopping.at_once():
            if self.config.examples:
                self._compare(self.selector)
            if self.vlm.cache is not None:
                print(self.vlm.cache.describe())

    def stop(self, error: BaseException) -> NoReturn:
        """Save as much as possible, print a one-line message, and exit."""
        from grip_env.common.finite import NonFiniteError
        from grip_env.envs.core.instances import RoomError
        from grip_env.tasks.files import DataError

        stopping.acknowledge()
        self._close_bars()
        interrupted = isinstance(error, KeyboardInterrupt)
        unheard = isinstance(error, BrokenPipeError) and unread()
        reason = str(error) or ("SIGINT" if interrupted else type(error).__name__)
        if unheard:
            reason = "nobody read its output any more"
        elif not interrupted and not isinstance(error, DataError | RoomError | NonFiniteError | CommandError):
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
        reason = " ".join(reason.split())
        status = RunStatus("interrupted" if interrupted or unheard else "failed", reason=reason)
        if isinstance(error, NonFiniteError) and not self._works():
            saved = f"the agent of the last checkpoint, {self._leave(status)}, is in {self.run.path}"
        else:
            saved = self._save_what_can_be(status)
        if unheard:
            quieten()
            raise SystemExit(141) from None
        if isinstance(error, CommandError):  # it has said so itself, unlike sys.exit() in a reward
            raise error
        place = "the report" if self.over else self.last.phase
        at = "before the first step" if place == "start" else f"in {place} at step {self.last.step + self.over}"
        if interrupted:
            say(f"\ninterrupted{'' if reason == 'SIGINT' else f' ({reason})'} {at}; {saved}")
            raise SystemExit(getattr(error, "code", 130)) from None
        text = f"stopped {at}: {reason}; {saved}"
        if isinstance(error, DataError | RoomError | NonFiniteError):
            raise CommandError(text) from None
        say(f"error: {text}{self._write_traceback(error)}", error=True)
        raise SystemExit(1) from error

    def _works(self) -> bool:
        """Return whether the agent in memory still chooses tokens."""
        import torch

        from agents.base import budget_to_count

        if self.shown is None:
            return False
        try:
            counts = budget_to_count(self.shown, 0.1)
            self.selector(self.vlm, self.shown, counts, torch.Generator().manual_seed(0))
        except ValueError:
            return False
        return not self.broken_update

    def _save_what_can_be(self, status: RunStatus) -> str:
        """Save the agent with the run's status, and return a message about the result."""
        own = f" --algo {self.config.algo}" if ":" in self.config.algo else ""
        compare = f"compare it with `python -m grip_env.evaluate {self.run.path}{own}`"
        if self.over:
            return f"the agent is trained and saved: {compare}"
        place = self.run.path
        current = self.status(status.state, status.reason)
        told: list[str] = []
        if self.broken_update:
            told.append("an update of its weights broke off")
        else:
            for spare in (False, True):
                try:
                    if spare:  # full disk or read-only folder: save to a temporary folder instead
                        self._leave(status)
                        self.run.path = Path(tempfile.mkdtemp(prefix="grip_env-"))
                    self.run.keep(self.agent, current)
                    if not spare:
                        return (
                            f"the agent so far is in {place}: {compare}"
                            if current.phase
                            else f"the agent in {place} has not finished its first step"
                        )
                    return f"{place} cannot be written ({told[0]}), so the agent so far is saved in {self.run.path}"
                except Exception as error:
                    told.append(" ".join((str(error) or type(error).__name__).split()))
                    if spare and self.run.path != place:
                        remove(self.run.path)
            self.run.path = place
        left = self._leave(status)
        if (place / "agent").exists():
            return f"the agent so far could not be saved ({told[0]}): the one in {place} is {left}"
        return f"the agent so far could not be saved ({told[0]}), and there is no earlier one"

    def _leave(self, status: RunStatus) -> str:
        """Write the run's status, keep the saved agent, and return its progress in words."""
        left = dataclasses.replace(self.run.status, state=status.state, reason=status.reason)
        with contextlib.suppress(OSError):
            remove(self.run.path / "agent.new")  # makes room for the status
            self.run.write_status(left)
        return f"that of {left.trained}" if left.phase else "untrained"

    def _write_traceback(self, error: BaseException) -> str:
        """Write the traceback of an error to a file, and return a message with its path."""
        path = self.run.path / "traceback.txt"
        try:
            write_atomically(path, "".join(traceback.format_exception(error)))
        except OSError:
            return ""
        return f"; where it happened: {path}"

    def _open_bar(self, phase: str) -> None:
        from tqdm import tqdm

        self._close_bars()
        self.bars[phase] = tqdm(
            total=self.phases.get(phase),
            initial=self.steps.get(phase, 0),
            desc={"warmup": "warm-up"}.get(phase, phase),
            unit="step",
            dynamic_ncols=True,
            disable=not self.config.progress,
        )

    def _update_bar(self, phase: str, averages: dict[str, float]) -> None:
        keys = {"reward": "reward", "log_likelihood_smallest_budgets": "ll@smallest", "loss": "loss"}
        self.bars[phase].update()
        self.bars[phase].set_postfix(
            {label: f"{averages[key]:.3f}" for key, label in keys.items() if key in averages}, refresh=False
        )

    def _close_bars(self) -> None:
        with contextlib.suppress(OSError):  # the terminal may be closed
            for bar in self.bars.values():
                bar.close()
