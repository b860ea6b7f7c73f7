"""Train an agent: ``python -m grip_env.train --algo grpo``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from grip_env.cli import (
    check_agents_package,
    check_at_least,
    check_name,
    find_algorithm,
    interruptible,
    load_model_and_task,
    note_written,
    parsed,
    print_result,
    quieten,
    say,
)
from grip_env.common import stopping
from grip_env.common.atomic_files import remove, write_atomically
from grip_env.common.errors import CommandError
from grip_env.common.output import unread
from grip_env.run_folder.config import Config, options_name
from grip_env.run_folder.folder import RunFolder, free_folder
from grip_env.run_folder.status import RunStatus

if TYPE_CHECKING:
    from tqdm import tqdm

    from agents.agent import Agent
    from grip_env.tasks.base import Task
    from grip_env.vlms.base import Encoded
    from grip_env.vlms.huggingface import HuggingFaceVLM

__all__ = ["main", "parse", "train"]


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Parse command-line arguments: options of the command and of the chosen algorithm."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    names = [Config.algo]
    for place, argument in enumerate(given):
        if argument.startswith("--algo="):
            names.append(argument.partition("=")[2])
        elif argument == "--algo" and place + 1 < len(given):
            names.append(given[place + 1])
    name = names[-1]
    options, key = _options_of(name), options_name(name)
    if key in {field.name for field in dataclasses.fields(Config)}:
        raise CommandError(f"--algo: {name!r} is also an option of this command: register the class by another name")
    fields = [(key, options, dataclasses.field(default_factory=options))] if dataclasses.fields(options) else []
    full = dataclasses.make_dataclass("Config", fields, bases=(Config,))
    found: Any = parsed(full, "python -m grip_env.train", given, description=Config.__doc__)
    values = {field.name: getattr(found, field.name) for field in dataclasses.fields(Config)}
    return Config(**(values | {"options": getattr(found, key, options())}))


def _options_of(name: str) -> type[Any]:
    """Return the dataclass of an algorithm's options, avoiding heavy imports if possible."""
    check_agents_package()
    from agents.training.options import options_of

    return options_of(name) or _options_class(find_algorithm(name))


def _options_class(algorithm: type[Agent]) -> type[Any]:
    from agents.agent import NoOptions

    return getattr(algorithm, "Options", None) or NoOptions


def train(config: Config) -> Path:
    """Train an agent, save it, compare it with others, and return the run's folder.

    On Ctrl-C, SIGTERM and SIGHUP the agent is saved as it is, and SystemExit carries the shell's code for the signal.
    The same happens on errors, with exit code 1, or 2 if the data or an option is wrong.
    """
    with stopping.handled():
        return _train(config)


def _train(config: Config) -> Path:
    algorithm = find_algorithm(config.algo)
    import torch

    from agents.agent import Setting
    from agents.saved import folder_of
    from grip_env.rewards.parsing import resolve_reward
    from grip_env.tasks.files import FileTask

    check_at_least(0, threads=config.threads, examples=config.examples, seed=config.seed)
    check_at_least(1, picture_every=config.picture_every)
    if config.seed >= 2**63:
        raise CommandError(f"--seed must be below 2**63; got {config.seed}")
    check_name(config.name)
    if not free_folder(config.runs / config.name) and config.name:  # checked again below, as loading takes time
        raise CommandError(f"{config.runs / config.name} already exists: choose another --name, or remove it")
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    if config.data is None and config.skip_bad:
        raise CommandError("--skip-bad is about the rows of --data: give both, or neither")
    options = _options_class(algorithm)() if config.options is None else config.options
    config = dataclasses.replace(config, options=options)
    teacher, key = getattr(options, "teacher", None), options_name(config.algo)
    if config.data is not None and teacher == "relevance":
        raise CommandError(
            f"--{key.replace('_', '-')}.teacher relevance needs the ground truth, which only the scenes task has: "
            "choose another teacher"
        )
    try:
        reward = resolve_reward(config.reward)
    except ValueError as error:
        raise CommandError(f"--reward: {error}") from None
    needed = ("train", "test") if config.examples else ("train",)
    vlm, task = load_model_and_task(config, config.task, config.data, config.skip_bad, needed, progress=config.progress)
    about: dict[str, Any] = {}
    if isinstance(task, FileTask):
        about["data"] = {"fingerprint": task.fingerprint, "sizes": {split: task.size(split) for split in task.splits}}
        config = dataclasses.replace(config, data=task.path)  # evaluate may be started from elsewhere
    if Path(config.vlm).is_dir() and config.vlm != "tiny":
        config = dataclasses.replace(config, vlm=str(Path(config.vlm).absolute()))
    try:
        agent = algorithm(Setting(vlm, task, reward, seed=config.seed, progress=config.progress), options)
        look = "validation" if task.size("validation") else "train"  # the user's data may have too few images for it
        shown = vlm.encode([task.example(look, index) for index in range(min(6, task.size(look)))])
    except (ValueError, NotImplementedError) as error:
        raise CommandError(str(error)) from None

    if teacher == "attention":
        try:
            vlm.attention(shown)
        except NotImplementedError as error:
            raise CommandError(f"--{key.replace('_', '-')}.teacher attention: {error}: choose gradient") from None
    checksum = vlm.checksum()
    # the names of user-defined classes and data may be long
    default = (
        f"{config.algo.replace(':', '.')[:100]}-{task.name[:60]}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    )
    with stopping.held():
        run = RunFolder(config.runs / (config.name or default), unique=not config.name)
        note_written(run.path)
        about |= {"vlm": {"name": vlm.name, "checksum": checksum}}
        if (place := folder_of(config.algo)) is not None:
            about["algorithm"] = {"folder": place}  # evaluate may be started from elsewhere
        run.write_config(saved_config(config), **about)
        training = _Training(config, run, agent, vlm, task)
        try:
            training.keep()  # from here on, there is always an agent that evaluate can read
            say(f"run: {run.path}")
            if isinstance(task, FileTask):
                say(f"data: {task.describe()}")
            training.learn(shown)
            if vlm.checksum() != checksum:
                raise RuntimeError("the vision-language model changed during training: its weights must stay frozen")
            training.report()
        except BaseException as error:
            training.stop(error)
    return run.path


class _Training:
    """Training of an agent and its run's folder, with signals deferred unless stated otherwise."""

    def __init__(self, config: Config, run: RunFolder, agent: Any, vlm: HuggingFaceVLM, task: Task) -> None:
        from agents.agent import as_selector
        from agents.learning import Metrics

        self.config, self.run, self.agent, self.vlm, self.task = config, run, agent, vlm, task
        self.selector: Any = as_selector(agent)
        self.last = Metrics("start", 0)
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

    def learn(self, shown: Encoded) -> None:
        """Train to the end, logging each step and saving checkpoints."""
        from grip_env.reports.plots import draw_gallery
        from grip_env.run_folder.tensorboard import Board

        averages: dict[str, float] = {}

        def checkpoint(step: int) -> None:
            self.keep()
            title = f"What the agent keeps, step {step}"
            board.picture(
                "kept tokens",
                stopping.patiently(lambda: draw_gallery(self.vlm, shown, self.selector, title=title)),
                step,
            )

        with Board(self.run.path) as board, stopping.whole_updates() as updating:
            try:
                steps = iter(self.agent.learn())
                while (metrics := stopping.patiently(lambda: next(steps, None))) is not None:
                    if metrics.phase not in self.bars:
                        averages.clear()
                        self._open_bar(metrics.phase)
                    last = self.last = metrics
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
                    stopping.check()
            finally:
                self.broken_update = updating()
                self._close_bars()
            if self.last.phase != "warmup" and (self.last.step + 1) % self.config.picture_every:
                checkpoint(self.last.step + 1)

    def report(self) -> None:
        """Mark the run as done, and compare the agent with other methods."""
        self.run.write_status(self.status("done"))
        self.over = True
        with stopping.at_once():
            if self.config.examples:
                from grip_env.evaluate import report

                about = self.config
                report(
                    self.run.path, self.vlm, self.task, self.selector, "test", about.examples,
                    progress=about.progress, algorithm=about.algo,
                )  # fmt: skip
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
        elif not interrupted and not isinstance(error, DataError | RoomError | NonFiniteError | SystemExit):
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
        reason = " ".join(reason.split())
        status = RunStatus("interrupted" if interrupted or unheard else "failed", reason=reason)
        if isinstance(error, NonFiniteError):  # the agent in memory may be broken
            saved = f"the agent of the last checkpoint, {self._leave(status)}, is in {self.run.path}"
        else:
            saved = self._save_what_can_be(status)
        if unheard:
            quieten()
            raise SystemExit(141) from None
        if isinstance(error, SystemExit):
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
                    if spare:
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


def saved_config(config: Config) -> dict[str, Any]:
    """Return a configuration as it is saved in ``config.json``.

    The algorithm's hyperparameters are under its own name, with all defaults filled in.

    Raises:
        ValueError: If a hyperparameter is invalid.
    """
    options = config.options
    content = dataclasses.asdict(
        dataclasses.replace(config, options=options.resolved() if hasattr(options, "resolved") else options)
    )
    return content | {options_name(config.algo): content.pop("options")}


def main() -> None:
    """Run the command."""
    with interruptible("interrupted before the first step; nothing was written."):
        run = train(parse())
        report = run / "report.json"
        told = json.loads(report.read_text(encoding="utf-8")) if report.exists() else None
        print_result({"run": str(run), "report": told})


if __name__ == "__main__":
    main()
