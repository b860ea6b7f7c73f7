"""Resuming of a run: configuration, newest snapshot, and checks that nothing has changed."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from grip_env.common.errors import CommandError
from grip_env.common.output import say
from grip_env.reports.live_run import can_resume
from grip_env.run_folder.config import Config, consent_needed, options_name, read_run_config
from grip_env.run_folder.folder import versions
from grip_env.run_folder.snapshots import snapshots

if TYPE_CHECKING:
    from agents.training.snapshot import Snapshot

__all__ = ["Earlier", "check_resumed", "open_run", "resumable_config", "saved_options"]

FREE = ("resume", "examples", "progress", "picture_every", "checkpoint_minutes", "runs", "name", "options")
"""Options of the command that may differ when a run is resumed: they do not change the training."""


def _read(run: Path) -> dict[str, Any]:
    from agents.training.options import options_of

    try:
        return read_run_config(run, options_of)
    except (OSError, ValueError) as error:
        raise CommandError(f"--resume: {error}") from None


def resumable_config(run: Path, named: Collection[str]) -> Config:
    """Return the configuration of a run, its hyperparameters as they are saved.

    Args:
        run: Folder of the run.
        named: Algorithm and reward that the user gave: code that the run's file names is not run otherwise.

    Raises:
        CommandError: If the folder is not a run, or it names code that the user did not name.
    """
    whole = _read(run)
    saved = whole["config"]
    if ":" in saved["algo"] and saved["algo"] not in named:
        raise CommandError(f"--resume: {consent_needed(run, whole)}: if you trust it, give --algo {saved['algo']}")
    reward = str(saved.get("reward", ""))
    if ":" in reward and reward not in named:
        raise CommandError(f"--resume: {run} needs the code of its reward: if you trust it, give --reward {reward}")
    hints = get_type_hints(Config)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Config):
        if field.name in saved:
            value = saved[field.name]
            is_path = hints[field.name] in (Path, Path | None) and value is not None
            values[field.name] = Path(value) if is_path else value
    return Config(**(values | {"options": saved.get(options_name(saved["algo"]), {}), "resume": run}))


def saved_options(given: Mapping[str, Any], options: type[Any]) -> Any:
    """Return hyperparameters from their saved values, an instance of the class ``options``."""
    known = {field.name: field.default for field in dataclasses.fields(options)}
    values = {name: value for name, value in given.items() if name in known}
    tuples = {name: tuple(value) for name, value in values.items() if isinstance(known[name], tuple)}  # lists in JSON
    return options(**(values | tuples))


def check_resumed(earlier: Config, config: Config) -> None:
    """Stop with an error if an option that may not differ from the resumed run differs."""
    pairs = [
        (field.name, getattr(earlier, field.name), getattr(config, field.name)) for field in dataclasses.fields(Config)
    ]
    changed = [(name, old, new) for name, old, new in pairs if name not in FREE and old != new]
    prefix = options_name(config.algo).replace("_", "-")
    known = {} if type(earlier.options) is not type(config.options) else vars(earlier.options)
    for name, old in known.items():
        new = getattr(config.options, name)
        if old != new and not (name == "steps" and new > old):
            changed.append((f"{prefix}.{name}", old, new))
    if changed:
        name, old, new = changed[0]
        more = "" if len(changed) == 1 else f" (and {len(changed) - 1} more)"
        raise CommandError(
            f"--{name.replace('_', '-')} is {old} in {earlier.resume}, and cannot become {new}{more}: leave it out, or "
            "train anew"
        )


@dataclass
class Earlier:
    """A run that is resumed."""

    path: Path
    saved: dict[str, Any]
    """Content of its ``config.json``."""
    snapshot: Snapshot

    def check(self, about: Mapping[str, Any]) -> None:
        """Stop with an error if the model or the data are others, and say which versions are.

        Args:
            about: Facts about the model and the data, as in ``config.json``.
        """
        import torch

        if about["vlm"]["checksum"] != self.saved["vlm"]["checksum"]:
            raise CommandError(f"the vision-language model is not the one that {self.path} was trained on: train anew")
        if about.get("data", {}).get("fingerprint") != self.saved.get("data", {}).get("fingerprint"):
            raise CommandError(f"the data have changed since {self.path} was trained on them: train anew")
        before, now = self.saved.get("versions", {}), versions()
        others = [
            f"{name} was {before[name]} and is {now[name]}" for name in now if before.get(name, now[name]) != now[name]
        ]
        threads = self.saved.get("threads")
        if threads not in (None, torch.get_num_threads()):
            others.append(f"CPU threads were {threads} and are {torch.get_num_threads()}")
        if others:
            say(f"note: {'; '.join(others)}: the last digits may differ from those of a run in one piece", error=True)

    def restore(self, agent: Any) -> None:
        """Restore the agent from the snapshot, or stop with an error; nothing is written."""
        import torch

        try:
            agent.restore(self.snapshot.part("agent"))
            torch.set_rng_state(self.snapshot.part("random").tensors["state"])
        except Exception as error:  # a user-defined class may raise anything
            reason = " ".join(str(error).split())
            raise CommandError(
                f"the snapshot in {self.path} cannot be restored ({type(error).__name__}: {reason}): train anew"
            ) from error

    def history(self) -> list[dict[str, Any]]:
        """Return when and at which steps the run was resumed, this time included."""
        now = {
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
            "steps": self.snapshot.about["steps"],
            "command": [Path(sys.executable).name, *sys.argv],
        }
        return [*self.saved.get("resumed", []), now]


def open_run(config: Config, algorithm: Any) -> Earlier:
    """Return the run that a configuration resumes, with its newest snapshot that is whole.

    Raises:
        CommandError: If there is none, the algorithm cannot be resumed, or the configuration is not that of the run.
    """
    from agents.training.snapshot import Snapshot

    assert config.resume is not None
    run, saved = config.resume, _read(config.resume)
    if not can_resume(algorithm):
        raise CommandError(f"--algo {saved['config']['algo']} cannot be resumed: it has no snapshot() and restore()")
    earlier = resumable_config(run, (config.algo, config.reward))
    earlier.options = saved_options(earlier.options, type(config.options))
    check_resumed(earlier, config)
    for path in snapshots(run):
        try:
            return Earlier(run, saved, Snapshot.read(path))
        except (OSError, ValueError) as error:
            say(f"note: {error}; the one before is used", error=True)
    raise CommandError(f"there is no snapshot in {run} to resume from: train anew")
