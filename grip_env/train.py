"""Train an agent: ``python -m grip_env.train --algo grpo``."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from grip_env.commands import (
    CommandError,
    ModelConfig,
    RunFolder,
    check_agents_package,
    check_at_least,
    importable_from_here,
    interruptible,
    load_model_and_task,
)

if TYPE_CHECKING:
    from agents.agent import Agent

__all__ = ["Config", "main", "parse", "train"]


@dataclass
class Config(ModelConfig):
    """Train an agent to choose visual tokens, and compare it with the baselines on held-out examples."""

    algo: str = "grpo"
    """The algorithm: grpo, rloo, reinforce, imitation, gumbel-top-k, sigmoid-gates, soft-top-k, ppo, a2c,
    maskable-ppo, or your own class, as "package.module:Class"."""
    task: Literal["scenes"] = "scenes"
    """Where images and questions come from."""
    data: Path | None = None
    """Your own images and questions instead of the task: a .jsonl or .json file, or a saved dataset's folder."""
    skip_bad: bool = False
    """Leave out rows of --data with faults, and list them, instead of stopping."""
    reward: str = "log_likelihood"
    """What a selection is worth: log_likelihood, probability, exact_match, agreement (with all tokens kept; needs no
    labels), a sum such as "agreement + 0.5 * exact_match", or your own as "package.module:object"."""
    seed: int = 0
    """Decides weights, examples, budgets and subsets."""
    name: str = ""
    """Name of the run; made from algorithm, task or data, seed and time when empty."""
    runs: Path = Path("runs")
    """Where runs are kept."""
    report_examples: int = 480
    """Test examples the final report is measured on; 0 skips the report."""
    picture_every: int = 100
    """Steps between galleries in TensorBoard and checkpoints."""
    threads: int = 0
    """CPU threads; 0 leaves the choice to PyTorch."""
    progress: bool = True
    """Show progress bars."""
    options: Annotated[Any, tyro.conf.Suppress] = None
    """Hyperparameters of the algorithm, of its class ``Options``; its defaults if ``None``. On the command line they
    have the algorithm's name, as in --grpo.steps."""


def find_algorithm(name: str) -> type[Agent]:
    """Return the algorithm of this name, or stop with one line."""
    check_agents_package()
    from agents.agent import find_algorithm

    try:
        with importable_from_here():
            return find_algorithm(name)
    except ValueError as error:
        raise CommandError(f"--algo: {error}") from None


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Return what command-line arguments say: options of the command and of the algorithm they name."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    names = [Config.algo]
    for place, argument in enumerate(given):
        if argument.startswith("--algo="):
            names.append(argument.partition("=")[2])
        elif argument == "--algo" and place + 1 < len(given):
            names.append(given[place + 1])
    name = names[-1]
    options, key = _options_class(find_algorithm(name)), options_name(name)
    if key in {field.name for field in dataclasses.fields(Config)}:
        raise CommandError(f"--algo: {name!r} is also an option of this command: register the class by another name")
    fields = [(key, options, dataclasses.field(default_factory=options))] if dataclasses.fields(options) else []
    full = dataclasses.make_dataclass("Config", fields, bases=(Config,))
    found: Any = tyro.cli(full, description=Config.__doc__, prog="python -m grip_env.train", args=given)
    values = {field.name: getattr(found, field.name) for field in dataclasses.fields(Config)}
    return Config(**(values | {"options": getattr(found, key, options())}))


def options_name(algo: str) -> str:
    """Return under what name an algorithm's hyperparameters are saved, and given on the command line."""
    return "agent" if ":" in algo else algo.replace("-", "_")


def _options_class(algorithm: type[Agent]) -> type[Any]:
    from agents.agent import NoOptions

    return getattr(algorithm, "Options", None) or NoOptions


def train(config: Config) -> Path:
    """Train, save and report; returns the run's folder.

    An interrupt (Ctrl-C) saves the agent as it is; SystemExit then carries the shell's code for an interrupt.
    """
    algorithm = find_algorithm(config.algo)
    import torch
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm

    from agents.agent import Setting, as_selector
    from agents.grpo import Metrics
    from grip_env.envs.instances import RoomError
    from grip_env.envs.rewards import resolve_reward
    from grip_env.finite import NonFiniteError
    from grip_env.report import draw_gallery
    from grip_env.tasks.files import DataError, FileTask

    check_at_least(0, threads=config.threads, report_examples=config.report_examples, seed=config.seed)
    check_at_least(1, picture_every=config.picture_every)
    if config.seed >= 2**63:
        raise CommandError(f"--seed must be below 2**63; got {config.seed}")
    if Path(config.name).name != config.name or config.name == "..":
        raise CommandError(f"--name is the name of a folder in --runs, without '/' in it; got {config.name!r}")
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
            f"--{key.replace('_', '-')}.teacher relevance needs the ground truth that the scenes task has and --data "
            "has not: choose another teacher"
        )
    try:
        reward = resolve_reward(config.reward)
    except ValueError as error:
        raise CommandError(f"--reward: {error}") from None
    needed = ("train", "test") if config.report_examples else ("train",)
    vlm, task = load_model_and_task(config, config.task, config.data, config.skip_bad, needed, progress=config.progress)
    about: dict[str, Any] = {}
    if isinstance(task, FileTask):
        about["data"] = {"fingerprint": task.fingerprint, "sizes": {split: task.size(split) for split in task.splits}}
        config = dataclasses.replace(config, data=task.path)  # evaluate may be started from elsewhere
    if Path(config.vlm).is_dir() and config.vlm != "tiny":
        config = dataclasses.replace(config, vlm=str(Path(config.vlm).absolute()))
    try:
        agent = algorithm(Setting(vlm, task, reward, seed=config.seed), options)
        look = "validation" if task.size("validation") else "train"  # few images of one's own may leave it empty
        shown = vlm.encode([task.example(look, index) for index in range(min(6, task.size(look)))])
    except (ValueError, NotImplementedError) as error:
        raise CommandError(str(error)) from None

    if teacher == "attention":
        try:
            vlm.attention(shown)
        except NotImplementedError as error:
            raise CommandError(f"--{key.replace('_', '-')}.teacher attention: {error}: choose gradient") from None
    checksum = vlm.checksum()
    name = (
        config.name or f"{config.algo.replace(':', '.')}-{task.name}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    )
    run = RunFolder(config.runs / name)
    about |= {"vlm": {"name": vlm.name, "checksum": checksum}}
    run.write_config(saved_config(config), **about)
    agent.save(run.path / "agent")  # from here on, whatever happens leaves an agent that evaluate can read
    print(f"run: {run.path}")
    if isinstance(task, FileTask):
        print(f"data: {task.describe()}")

    total: dict[str, int] = getattr(agent, "phases", {})
    selector: Any = as_selector(agent)  # type: ignore[arg-type] # one or the other is there, find_algorithm says
    bars: dict[str, Any] = {}
    writer = SummaryWriter(str(run.path))
    last = Metrics("start", 0)
    averages: dict[str, float] = {}

    def checkpoint(step: int) -> None:
        agent.save(run.path / "agent")
        sheet = draw_gallery(vlm, shown, selector, title=f"What the agent keeps, step {step}")
        writer.add_image("kept tokens", sheet, step, dataformats="HWC")

    try:
        for last in agent.learn():
            if last.phase not in bars:
                for bar in bars.values():
                    bar.close()
                averages.clear()
                bars[last.phase] = tqdm(
                    total=total.get(last.phase),
                    desc={"warmup": "warm-up"}.get(last.phase, last.phase),
                    unit="step",
                    dynamic_ncols=True,
                    disable=not config.progress,
                )
            run.log(last.phase, last.step, last.values)
            for key, value in last.values.items():
                writer.add_scalar(f"{last.phase}/{key}", value, last.step)
                averages[key] = 0.9 * averages.get(key, value) + 0.1 * value
            keys = {"reward": "reward", "log_likelihood_smallest_budgets": "ll@smallest", "loss": "loss"}
            bars[last.phase].update()
            bars[last.phase].set_postfix(
                {label: f"{averages[key]:.3f}" for key, label in keys.items() if key in averages}, refresh=False
            )
            if last.phase == "warmup":
                if last.step + 1 == total.get("warmup"):
                    agent.save(run.path / "warmup")  # now: what comes next is already one reward further
                    checkpoint(0)
            elif (last.step + 1) % config.picture_every == 0:
                checkpoint(last.step + 1)
        for bar in bars.values():
            bar.close()
        if last.phase != "warmup" and (last.step + 1) % config.picture_every:
            checkpoint(last.step + 1)
        if vlm.checksum() != checksum:
            raise RuntimeError("the vision-language model changed during training: its weights must stay frozen")
        last = Metrics("the report", last.step + 1)
        if config.report_examples:
            from grip_env.evaluate import report

            report(run.path, vlm, task, selector, "test", config.report_examples, progress=config.progress)
        if vlm.cache is not None:
            print(vlm.cache.describe())
    except KeyboardInterrupt:
        for bar in bars.values():
            bar.close()
        agent.save(run.path / "agent")
        print(f"\ninterrupted in {last.phase} at step {last.step}; the agent so far is saved.")
        print(f"compare it:  python -m grip_env.evaluate {run.path}")
        raise SystemExit(130) from None
    except NonFiniteError as error:  # what the agent has become since the last checkpoint may be worthless
        raise CommandError(f"stopped: {error}; the agent of the last checkpoint is in {run.path}") from None
    except (DataError, RoomError) as error:
        agent.save(run.path / "agent")
        raise CommandError(
            f"stopped in {last.phase} at step {last.step}: {error}; the agent so far is in {run.path}"
        ) from None
    finally:
        writer.close()
    return run.path


def saved_config(config: Config) -> dict[str, Any]:
    """Return a configuration as it is saved: the algorithm's hyperparameters under its own name, all filled in.

    Raises:
        ValueError: If a hyperparameter is impossible.
    """
    options = config.options
    content = dataclasses.asdict(
        dataclasses.replace(config, options=options.resolved() if hasattr(options, "resolved") else options)
    )
    return content | {options_name(config.algo): content.pop("options")}


def main() -> None:
    """Run the command."""
    with interruptible("interrupted before the first step; nothing was written."):
        train(parse())


if __name__ == "__main__":
    main()
