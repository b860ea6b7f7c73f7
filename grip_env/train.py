"""Train an agent: ``python -m grip_env.train --algo grpo``."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    say,
)
from grip_env.common import stopping
from grip_env.common.devices import set_threads
from grip_env.common.errors import CommandError
from grip_env.reports.live_run import LiveRun, Report
from grip_env.reports.resuming import check_resumed, open_run, resumable_config, saved_options
from grip_env.run_folder.config import Config, options_name
from grip_env.run_folder.folder import RunFolder, free_folder

if TYPE_CHECKING:
    from agents.agent import Agent
    from grip_env.tasks.base import Task
    from grip_env.vlms.huggingface import HuggingFaceVLM

__all__ = ["main", "parse", "train"]


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Parse command-line arguments: options of the command and of the chosen algorithm."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    resumed, named = _option(given, "resume"), _option(given, "algo")
    earlier = None if not resumed else resumable_config(Path(resumed[-1]), (*named, *_option(given, "reward")))
    name = (named or [Config.algo if earlier is None else earlier.algo])[-1]
    options, key = _options_of(name), options_name(name)
    if key in {field.name for field in dataclasses.fields(Config)}:
        raise CommandError(f"--algo: {name!r} is also an option of this command: register the class by another name")
    fields = [(key, options, dataclasses.field(default_factory=options))] if dataclasses.fields(options) else []
    full = dataclasses.make_dataclass("Config", fields, bases=(Config,))
    default = None
    if earlier is not None:
        earlier.options = saved_options(earlier.options if name == earlier.algo else {}, options)
        values = {field.name: getattr(earlier, field.name) for field in dataclasses.fields(Config)}
        default = full(**values, **({key: earlier.options} if fields else {}))
    found: Any = parsed(full, "python -m grip_env.train", given, description=Config.__doc__, default=default)
    values = {field.name: getattr(found, field.name) for field in dataclasses.fields(Config)}
    config = Config(**(values | {"options": getattr(found, key, options())}))
    if earlier is not None:
        check_resumed(earlier, config)
    return config


def _option(given: Sequence[str], name: str) -> list[str]:
    """Return the values of an option in a command line."""
    found = []
    for place, argument in enumerate(given):
        if argument.startswith(f"--{name}="):
            found.append(argument.partition("=")[2])
        elif argument == f"--{name}" and place + 1 < len(given):
            found.append(given[place + 1])
    return found


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

    set_threads(config.threads)
    check_at_least(0, examples=config.examples, seed=config.seed)
    check_at_least(1, picture_every=config.picture_every)
    if config.seed >= 2**63:
        raise CommandError(f"--seed must be below 2**63; got {config.seed}")
    if not config.checkpoint_minutes > 0:
        raise CommandError(f"--checkpoint-minutes must be above 0; got {config.checkpoint_minutes:g}")
    check_name(config.name)
    # checked again below, as loading takes time
    if config.resume is None and config.name and not free_folder(config.runs / config.name):
        raise CommandError(f"{config.runs / config.name} already exists: choose another --name, or remove it")
    torch.manual_seed(config.seed)
    if config.data is None and config.skip_bad:
        raise CommandError("--skip-bad is about the rows of --data: give both, or neither")
    options = _options_class(algorithm)() if config.options is None else config.options
    config = dataclasses.replace(config, options=options)
    earlier = None if config.resume is None else open_run(config, algorithm)
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
        about |= {"vlm": {"name": vlm.name, "checksum": checksum}}
        if (place := folder_of(config.algo)) is not None:
            about["algorithm"] = {"folder": place}  # evaluate may be started from elsewhere
        if earlier is None:
            run = RunFolder(config.runs / (config.name or default), unique=not config.name)
            note_written(run.path)
            run.write_config(saved_config(config), **about)
        else:
            earlier.check(about)
            earlier.restore(agent)
            run = RunFolder.reopen(earlier.path)
            run.write_config(saved_config(config), **about, resumed=earlier.history())
        training = LiveRun(config, run, agent, vlm, report_of(config, run, vlm, task))
        try:
            if earlier is None:
                training.keep()  # from here on, there is always an agent that evaluate can read
            else:
                training.go_on(earlier.snapshot.about["steps"])
            say(f"run: {run.path}")
            if earlier is not None:
                say(f"resumed at {run.status.trained}")
            if isinstance(task, FileTask):
                say(f"data: {task.describe()}")
            training.learn(shown)
            if vlm.checksum() != checksum:
                raise RuntimeError("the vision-language model changed during training: its weights must stay frozen")
            training.report()
        except BaseException as error:
            training.stop(error)
    return run.path


def report_of(config: Config, run: RunFolder, vlm: HuggingFaceVLM, task: Task) -> Report:
    """Return a function that compares the agent with other methods on test examples."""

    def compare(selector: Any) -> None:
        from grip_env.evaluate import report

        more: dict[str, Any] = {"progress": config.progress, "algorithm": config.algo}
        report(run.path, vlm, task, selector, "test", config.examples, **more)

    return compare


def saved_config(config: Config) -> dict[str, Any]:
    """Return a configuration as it is saved in ``config.json``.

    The algorithm's hyperparameters are under its own name, with all defaults filled in.

    Raises:
        ValueError: If a hyperparameter is invalid.
    """
    options = config.options
    content = dataclasses.asdict(
        dataclasses.replace(
            config, resume=None, options=options.resolved() if hasattr(options, "resolved") else options
        )
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
