"""Compare trained agents with other methods: ``python -m grip_env.evaluate runs/NAME``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from grip_env.cli import (
    check_agents_package,
    check_at_least,
    interruptible,
    load_model_and_task,
    parsed,
    print_result,
    say_unfinished,
    writing,
)
from grip_env.common.atomic_files import content_of, folder_on_disk, write_atomically
from grip_env.common.devices import set_threads
from grip_env.common.errors import CommandError
from grip_env.common.plugins import importable_from_here
from grip_env.reports.comparison import AGENT, BUDGETS, WARMUP, Comparison, compare
from grip_env.reports.saved_runs import Run, group_runs, load_agent, load_run
from grip_env.run_folder.config import ModelConfig, consent_needed
from grip_env.run_folder.folder import make_folder
from grip_env.run_folder.status import read_status

if TYPE_CHECKING:
    from agents.base import Selector
    from agents.methods import Runnable
    from grip_env.tasks.base import Task
    from grip_env.vlms.base import Encoded
    from grip_env.vlms.huggingface import HuggingFaceVLM

__all__ = ["Config", "evaluate", "main", "report"]


@dataclass
class Config:
    """Compare trained agents with other methods in tables, curves and a gallery.

    A single run is compared with the baselines and its own warm-up. With several runs, runs that differ only in their
    seed share one row, with means and standard deviations over the seeds; the first run's row is compared with all
    others.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Folders of runs, as printed by train; without any, only the --policies are compared."""
    policies: str = ""
    """Methods to compare with instead of the usual baselines, separated by commas. Pruners: random, uniform-grid, norm,
    cls-attention, received-attention, vispruner, divprune, cdpruner, fastv-score, sparsevlm-score, dart-score. Other
    tokens: visionzip, downsampled. Inside the language model: fastv, fastv-kept, pyramiddrop, pyramiddrop-kept. With
    the answer: oracle, random-search, greedy-forward, greedy-backward, swap-search, cross-entropy. Or your
    own policy, as package.module:Class."""
    split: Literal["test", "validation", "train"] = "test"
    """Examples to compare on; use validation while you tune."""
    examples: int = 480
    """Number of examples."""
    budgets: tuple[float, ...] = BUDGETS
    """Shares of the visual tokens to keep."""
    algo: str = ""
    """Your own classes that the runs were trained with, as package.module:Class, separated by commas. Code named in a
    run's files is only imported if you name it here as well."""
    data: Path | None = None
    """Your own images and questions to compare on; by default, those the run was trained on, if any."""
    skip_bad: bool = False
    """Leave out faulty rows of the data, and list them; runs trained with --skip-bad do so anyway."""
    task: Literal["scenes", "scenes-hard"] = "scenes"
    """The task, if no runs are given."""
    vlm: str = ""
    """The frozen model if no runs are given: "tiny" (the default) or a folder with a saved model."""
    out: Path | None = None
    """Folder for the tables (report.*), pareto.png and kept_tokens.png. By default, RUN/SPLIT-EXAMPLES for one run;
    for several, comparison-SPLIT-EXAMPLES beside the first; for none, the same in the folder runs."""
    device: str = "auto"
    """Device for the model: "cpu", "cuda", "cuda:1", "mps", ...; "auto" takes a CUDA device if there is one."""
    threads: int = 0
    """Number of CPU threads; 0 leaves the choice to PyTorch."""
    progress: bool = True
    """Show progress bars."""


def report(
    run: Path,
    vlm: HuggingFaceVLM,
    task: Task,
    agent: Selector,
    split: str,
    examples: int,
    out: Path | None = None,
    policies: str = "",
    budgets: Sequence[float] = BUDGETS,
    progress: bool = True,
    algorithm: str | None = None,
) -> Comparison:
    """Compare a run's agent, print the tables, and write tables and pictures.

    Args:
        run: The run's folder; its warm-up, if there is one, is included in the comparison.
        vlm: The frozen model.
        task: The task that the examples come from.
        agent: The trained agent.
        split: Split of the examples.
        examples: Number of examples.
        out: Folder to write to; by default, the run's.
        policies: Methods to compare with, see :class:`Config`.
        budgets: Shares of the tokens to keep.
        progress: Show a progress bar.
        algorithm: User-defined class, if any, that the run's warm-up may be loaded with; see ``Config.algo``.
    """
    methods, notes = named_methods(policies, vlm, task, split)
    if folder_on_disk(run / "warmup").is_dir():
        methods[WARMUP] = load_agent(load_run(run), vlm, "warmup", algorithm)
    status = read_status(run)
    name = f"{AGENT} ({status.mark})" if status is not None and status.mark else AGENT
    methods[name] = agent
    out = make_folder(out or run)
    comparison = compare(vlm, task, methods, split, examples, budgets, progress=progress)
    comparison.notes[:0] = notes
    print_and_draw(comparison, out, vlm, task, agent, name if policies else None, name)
    return comparison


def named_methods(policies: str, vlm: HuggingFaceVLM, task: Task, split: str) -> tuple[dict[str, Runnable], list[str]]:
    """Return the methods named in ``policies``, and notes on usual methods that were left out.

    Returns:
        Methods by their names in tables, and a reason for each method that cannot run here.

    Raises:
        CommandError: If a name is unknown, or a method that was asked for cannot run here.
    """
    from agents.methods import find_method

    usual = ("random", "uniform-grid", "cls-attention", "divprune", "oracle")
    names = [name.strip() for name in policies.split(",") if name.strip()] or list(usual)
    first: Encoded = vlm.encode([task.example(split, 0)])
    found: dict[str, Runnable] = {}
    notes: list[str] = []
    for name in names:
        if ":" in name:
            found[name] = _own_policy(name)
            _try(name, found[name], vlm, first)
            continue
        try:
            one = find_method(name)
        except ValueError as error:
            raise CommandError(f"--policies: {error}, or give package.module:Class") from None
        refusal = one.refusal(vlm, first)
        if refusal is None:
            found[one.title] = one.run
        elif policies:
            raise CommandError(f"--policies {name}: {refusal}; leave it out")
        elif "ground truth" not in one.needs:  # missing ground truth needs no note
            notes.append(refusal)
    return found, notes


def _own_policy(name: str) -> Runnable:
    """Return a user-defined policy, constructed without arguments."""
    import pkgutil

    from agents.agent import as_selector

    try:
        with importable_from_here():
            return as_selector(pkgutil.resolve_name(name)())
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise CommandError(
            f"--policies {name}: {error}; give package.module:Class, importable from here and without arguments"
        ) from None


def _try(name: str, policy: Runnable, vlm: HuggingFaceVLM, first: Encoded) -> None:
    """Run a user-defined policy on one example, or stop with an error.

    A failure in the middle of a comparison would lose the results so far.
    """
    import torch

    from agents.methods import run_method

    try:
        one = torch.ones_like(first.lengths)  # on the model's device, as all inputs of a policy
        chosen = run_method(policy, vlm, first, one, torch.Generator())
        vlm.score(first, chosen[:, None])  # type: ignore[index]
    except (Exception, SystemExit) as error:  # any error here is the policy's
        raise CommandError(
            f"--policies {name} fails on the first example with one token to keep: {type(error).__name__}: {error}"
        ) from None


def print_and_draw(
    comparison: Comparison,
    out: Path,
    vlm: HuggingFaceVLM,
    task: Task,
    shown: Selector | None,
    main: str | None,
    first: str = AGENT,
) -> None:
    """Print the tables, and write tables and pictures to the folder ``out``.

    Args:
        comparison: The results.
        out: The folder.
        vlm: The frozen model.
        task: The task that the examples come from.
        shown: Selector whose selections the gallery shows; ``None`` for no gallery.
        main: Method that a further table compares with all others; ``None`` leaves this table out.
        first: Method highlighted in the curves if ``main`` is ``None``.
    """
    from PIL import Image

    from grip_env.reports.plots import draw_curve, draw_gallery

    tables = comparison.markdown() if main is None else f"{comparison.markdown()}\n\n{comparison.margins(main)}"
    written = [out / "report.md", out / "pareto.png"]
    gallery = None
    if shown is not None:
        split = comparison.split
        encoded = vlm.encode([task.example(split, index) for index in range(min(6, task.size(split)))])
        gallery = Image.fromarray(draw_gallery(vlm, encoded, shown))
        written.append(out / "kept_tokens.png")
    with writing(*written):  # before printing, as the reader of the output may have gone
        draw_curve(comparison, out / "pareto.png", main or first)
        if gallery is not None:
            write_atomically(out / "kept_tokens.png", content_of(lambda file: gallery.save(file, "png")))
        comparison.save(out)
        write_atomically(out / "report.md", tables + "\n")
    print("\n" + tables + "\n")
    for path in written:
        print(f"wrote {path}")


def _model_and_task(config: Config, run: Run | None) -> tuple[HuggingFaceVLM, Task]:
    """Load the run's model, and its task or the data given to the command."""
    from grip_env.tasks.files import FileTask

    if run is None:
        model = ModelConfig(vlm=config.vlm or "tiny", device=config.device)
        return load_model_and_task(model, config.task, config.data, config.skip_bad, (config.split,))
    trained = run.config
    data, skip_bad = config.data, config.skip_bad
    if data is None and trained.get("data"):
        data, skip_bad = Path(trained["data"]), skip_bad or trained["skip_bad"]
    if data is None and skip_bad:
        raise CommandError("--skip-bad is about the rows of --data, and this run was trained without: leave it out")
    names = {field.name for field in fields(ModelConfig)} & set(trained)
    cache = Path(trained["cache"]) if trained.get("cache") else None
    model = ModelConfig(**{name: trained[name] for name in names} | {"device": config.device, "cache": cache})
    vlm, task = load_model_and_task(model, trained["task"], data, skip_bad, (config.split,))
    if isinstance(task, FileTask) and config.data is None and task.fingerprint != run.saved["data"]["fingerprint"]:
        print(f"note: {task.path} has changed since this agent was trained on it: {task.describe()}", file=sys.stderr)
    return vlm, task


def evaluate(config: Config) -> Comparison:
    """Compare the agents of runs with other methods, print the tables and draw the pictures.

    Raises:
        CommandError: If an option is wrong, or a run, its agent, its model or its data cannot be read.
    """

    from grip_env.tasks.files import DataError

    check_at_least(1, examples=config.examples)
    set_threads(config.threads)
    if not config.budgets or not all(0 < budget <= 1 for budget in config.budgets):
        raise CommandError(f"--budgets are shares of the visual tokens in (0, 1]; got {config.budgets}")
    if not config.runs and not config.policies:
        raise CommandError("there is nothing to compare: give a run, or --policies, such as --policies random,divprune")
    if config.runs and config.vlm:
        raise CommandError("--vlm is for comparisons without a run: leave it out, the run says which model it is about")
    runs = [load_run(path) for path in config.runs]
    _check_algo(config.algo, runs)
    for run in runs:
        say_unfinished(run.path)
    vlm, task = _model_and_task(config, runs[0] if runs else None)
    # a separate folder, so that evaluating on validation does not replace the report written by training
    parts = [task.name] if config.data is not None else []
    place = "-".join([*parts, config.split, str(config.examples)])
    try:
        if len(runs) == 1:
            out = config.out or runs[0].path / place
            agent = load_agent(runs[0], vlm, algorithm=_algorithm(config, runs[0]))
            comparison = report(
                runs[0].path, vlm, task, agent, config.split, config.examples, out, config.policies, config.budgets,
                config.progress, _algorithm(config, runs[0]),
            )  # fmt: skip
        else:
            out = config.out or (runs[0].path.parent if runs else Path("runs")) / f"comparison-{place}"
            comparison = _compare_runs(config, runs, vlm, task, out)
    except DataError as error:
        raise CommandError(str(error)) from None
    if vlm.cache is not None:
        print(vlm.cache.describe())
    print_result(comparison.plain())
    return comparison


def _named(algo: str) -> list[str]:
    return [name.strip() for name in algo.split(",") if name.strip()]


def _algorithm(config: Config, run: Run) -> str | None:
    """Return the algorithm that a run was trained with if --algo names it, or else ``None``."""
    return run.config["algo"] if run.config["algo"] in _named(config.algo) else None


def _check_algo(algo: str, runs: Sequence[Run]) -> None:
    """Stop with an error if --algo names an unused class or omits a user-defined one of a run."""
    known = list(dict.fromkeys(run.config["algo"] for run in runs))
    for name in _named(algo):
        if name not in known:
            theirs = f"they were trained with {', '.join(known)}" if runs else "no run is given"
            raise CommandError(f"--algo {name} was not used by any of the runs: {theirs}")
    for run in runs:
        if ":" in run.config["algo"] and run.config["algo"] not in _named(algo):
            wanted = ",".join(name for name in known if ":" in name)
            raise CommandError(f"{consent_needed(run.path, run.saved)}: if you trust it, give --algo {wanted}")


def _compare_runs(config: Config, runs: Sequence[Run], vlm: HuggingFaceVLM, task: Task, out: Path) -> Comparison:
    """Compare several runs, or none, with each other and with the --policies."""
    for run in runs[1:]:
        for key in ("vlm", "dtype", "attn_implementation", "position_policy", "task", "data"):
            if run.config.get(key) != runs[0].config.get(key):
                raise CommandError(
                    f"{run.path} was trained with --{key.replace('_', '-')} {run.config.get(key)}, and {runs[0].path} "
                    f"with {runs[0].config.get(key)}: compare runs of one model on one task"
                )
    if len({run.path.resolve() for run in runs}) < len(runs):
        raise CommandError("a run is named twice: give each once, as every run of a row counts as another seed")
    methods, notes = named_methods(config.policies, vlm, task, config.split)
    agents: dict[str, Runnable] = {
        str(run.path): load_agent(run, vlm, algorithm=_algorithm(config, run)) for run in runs
    }
    groups = group_runs(runs)
    out = make_folder(out)
    comparison = compare(
        vlm, task, methods | agents, config.split, config.examples, config.budgets, progress=config.progress
    )
    comparison = comparison.merged(groups)
    comparison.notes[:0] = notes
    spent = {str(run.path): run.training_cost() for run in runs}
    for name, members in groups.items():
        known = [cost for cost in (spent[member] for member in members) if cost is not None]
        whole = known if len(known) == len(members) else []
        comparison.training[name] = {
            key: sum(cost[key] for cost in whole) / len(whole) for key in ("seconds", "forwards") if whole
        }
    shown: Any = agents[str(runs[0].path)] if runs else None
    print_and_draw(comparison, out, vlm, task, shown, next(iter(groups), None))
    return comparison


def main() -> None:
    """Run the command."""
    with interruptible("interrupted; nothing was written."):
        config = parsed(Config, "python -m grip_env.evaluate", lists=("policies", "algo"))
        check_agents_package()
        from grip_env.common.finite import NonFiniteError

        try:
            evaluate(config)
        except NonFiniteError as error:
            raise CommandError(str(error)) from None


if __name__ == "__main__":
    main()
