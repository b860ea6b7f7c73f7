"""Benchmark of the default agent over several seeds: ``python -m grip_env.benchmark``.

``python -m grip_env.benchmark latency`` measures what pruning saves (see :mod:`grip_env.bench.latency`), and
``python -m grip_env.benchmark speed`` the time of the environments (see :mod:`grip_env.bench.speed`).
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from grip_env.cli import (
    check_agents_package,
    check_at_least,
    interruptible,
    parsed,
    print_result,
    print_verdicts,
)
from grip_env.common.devices import set_threads
from grip_env.common.errors import CommandError
from grip_env.reports.comparison import Margin
from grip_env.reports.saved_runs import read_log

__all__ = ["Config", "drawing_speed", "main", "paired", "promises", "run_seed", "summary"]

GRID = (0.05, 0.1, 0.2, 0.3, 0.5)
RIVALS = ("uniform grid", "CLS attention", "max-min diversity")


@dataclass
class Config:
    """Train the default agent with several seeds and check the claims of the README.

    Means over the seeds are printed. Finished runs are not repeated, so an interrupted benchmark can be resumed; an
    unfinished run is removed and started again. Two other benchmarks train nothing (see their --help):
    `python -m grip_env.benchmark latency` measures time and memory of pruning, and `python -m grip_env.benchmark speed`
    those of the environments.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds to train with."""
    runs: Path = Path("runs")
    """Folder for the runs ``benchmark-seed0``, ``benchmark-seed1``, ..."""
    threads: int = 0
    """Number of CPU threads; 0 leaves the choice to PyTorch."""
    examples: int = 1440
    """Number of test examples that the means are taken over."""
    drawing: bool = True
    """Also compare the time to draw an example's picture with the time to score it."""
    extra: tuple[str, ...] = field(default_factory=tuple)
    """Options passed to grip_env.train in every run, as in --extra=--grpo.steps=100."""


def summary(reports: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, tuple[float, float]]]]:
    """Return means and standard deviations over seeds for each method and budget.

    Returns:
        {method: {budget: {"log_likelihood" | "accuracy" | "gap": (mean, standard deviation)}}}; "gap" is the share
        of the gap from random to oracle that the method closes.
    """
    table: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
    for method, row in reports[0]["cells"].items():
        table[method] = {}
        for budget in row:
            values: dict[str, list[float]] = {"log_likelihood": [], "accuracy": [], "gap": []}
            for report in reports:
                cells = report["cells"]
                cell = cells[method][budget]
                low, high = (cells[name][budget]["log_likelihood"] for name in ("random", "oracle"))
                values["log_likelihood"].append(cell["log_likelihood"])
                values["accuracy"].append(cell["accuracy"])
                values["gap"].append((cell["log_likelihood"] - low) / (high - low))
            table[method][budget] = {
                key: (statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else 0.0) for key, v in values.items()
            }
    return table


def paired(reports: list[dict[str, Any]], method: str, rival: str, budget: str) -> tuple[float, float]:
    """Return by how many nats ``method`` beats ``rival``, with the 95% interval's half width.

    The interval is over examples. Both methods answer the same examples, so their difficulty cancels out.
    """
    keys = (f"{name}@{float(budget)}" for name in (method, rival))
    margin = Margin.of(*(np.stack([report["single"][key] for report in reports]) for key in keys))
    return margin.mean, margin.interval


def promises(reports: list[dict[str, Any]], ratio: float) -> list[tuple[str, bool]]:
    """Check the README's claims about the default agent.

    Args:
        reports: One report for each seed, from :func:`run_seed`.
        ratio: Time of GRPO steps over the time of the scoring inside them.

    Returns:
        For each claim, (statement with numbers, whether it holds).
    """
    from grip_env.reports.comparison import AGENT, WARMUP

    table, checks = summary(reports), []
    for budget in ("0.05", "0.1"):
        gap = table[AGENT][budget]["gap"][0]
        checks.append((f"{float(budget):.0%}: closes {gap:.0%} of the gap from random to oracle (>= 80%)", gap >= 0.8))
    for rival in RIVALS:
        margins = {budget: paired(reports, AGENT, rival, str(budget)) for budget in GRID}
        worst = min(margins, key=lambda budget: margins[budget])
        margin, interval = margins[worst]
        text = f"beats {rival} from 5% to 50%; smallest margin {margin:+.3f} +- {interval:.3f} nats at {worst:.0%}"
        checks.append((text, margin > 0))
    for budget in ("0.05", "0.1"):
        gain, interval = paired(reports, AGENT, WARMUP, budget)
        noise = max(table[name][budget]["log_likelihood"][1] for name in (AGENT, WARMUP))
        text = f"GRPO gains {gain:+.3f} +- {interval:.3f} nats on its warm-up, seed spread {noise:.3f}"
        checks.append((f"{float(budget):.0%}: {text}", gain > noise))
    checks.append((f"a GRPO step takes {ratio:.2f}x the scoring inside it (<= 1.5)", ratio <= 1.5))
    return checks


def run_seed(config: Config, seed: int) -> tuple[dict[str, Any], float | None]:
    """Train with one seed and compare, or read the results of an earlier call.

    Returns:
        The report, with the log-likelihoods of single examples as "single", and the minutes that training took, or
        ``None`` if the run existed already.

    Raises:
        CommandError: If a run was made with other settings, or ``extra`` gives --data.
    """
    from grip_env import evaluate, train
    from grip_env.reports.saved_runs import load_run

    folder = config.runs / f"benchmark-seed{seed}"
    options = replace(
        train.parse(config.extra),
        seed=seed,
        name=folder.name,
        runs=config.runs,
        threads=config.threads,
    )
    if options.data is not None:
        raise CommandError("the benchmark checks promises about the scenes task: leave out --data")
    minutes = None
    if folder.is_dir() and not (folder / "report.json").is_file():
        print(f"{folder} has not finished: starting it again")
        shutil.rmtree(folder)
    if folder.is_dir():
        # an option that is newer than the run has its default value
        saved = train.saved_config(train.parse([])) | load_run(folder).config
        wanted = json.loads(json.dumps(train.saved_config(options), default=str))
        other = sorted(
            key for key in wanted if saved.get(key) != wanted[key] and key not in ("runs", "threads", "progress")
        )
        if other:
            raise CommandError(f"{folder} was made with other settings of {', '.join(other)}: choose another --runs")
    else:
        began = time.perf_counter()
        train.train(options)
        minutes = (time.perf_counter() - began) / 60
    out = folder / f"test-{config.examples}"
    if not (out / "report.json").is_file():
        evaluate.evaluate(
            evaluate.Config((folder,), algo=options.algo, examples=config.examples, threads=config.threads)
        )
    report = json.loads((out / "report.json").read_text())
    return report | {"single": load_file(out / "report.safetensors")}, minutes


def drawing_speed(batches: int = 5, size: int = 48) -> tuple[float, float, float]:
    """Return milliseconds to draw an example's picture, to make the example, and to score it.

    Making includes choosing scene, question and relevance; scoring includes the vision encoder. The times are medians
    over batches. Each kind of work runs separately, because PyTorch's threads keep spinning for a while after work.
    """
    from grip_env.tasks.scenes import SceneTask
    from grip_env.vlms import load_vlm

    vlm, task = load_vlm("tiny"), SceneTask()
    time.sleep(1)
    examples = [task.example("test", index) for index in range(batches * size)]  # draws every sprite once

    def milliseconds(work: Callable[[range], object]) -> float:
        times = []
        for start in range(0, batches * size, size):
            began = time.perf_counter()
            work(range(start, start + size))
            times.append((time.perf_counter() - began) / size * 1e3)
        return statistics.median(times)

    def score(rows: range) -> None:
        encoded = vlm.encode([examples[row] for row in rows])
        vlm.score(encoded, encoded.full_selection())

    make = milliseconds(lambda rows: [task.example("test", row) for row in rows])
    scenes = [task.scene_and_question("test", row)[0] for row in range(batches * size)]
    draw = milliseconds(lambda rows: [scenes[row].draw() for row in rows])
    return draw, make, milliseconds(score)


def main() -> None:
    """Run the command."""
    if sys.argv[1:2] == ["latency"]:
        from grip_env.bench import latency

        return latency.main(sys.argv[2:])
    if sys.argv[1:2] == ["speed"]:
        from grip_env.bench import speed

        return speed.main(sys.argv[2:])
    with interruptible("interrupted; run the same command again to continue after the finished runs."):
        _run(parsed(Config, "python -m grip_env.benchmark"))


def _run(config: Config) -> None:
    check_agents_package()
    set_threads(config.threads)
    check_at_least(1, seeds=len(config.seeds), examples=config.examples)
    from grip_env.reports.comparison import AGENT

    reports: list[dict[str, Any]] = []
    minutes: list[float] = []
    spent, scoring = 0.0, 0.0
    for seed in config.seeds:
        report, took = run_seed(config, seed)
        reports.append(report)
        minutes += [] if took is None else [took]
        for step in read_log(config.runs / f"benchmark-seed{seed}" / "grpo.csv"):
            spent += step["seconds"]
            scoring += step["scoring_seconds"]

    table = summary(reports)
    budgets = list(table[AGENT])
    count, split = reports[0]["examples"], reports[0]["split"]
    print(f"\n{count} {split} examples, mean (standard deviation) over {len(reports)} seeds")
    for key, title in (("log_likelihood", "answer log-likelihood"), ("accuracy", "accuracy"), ("gap", "gap closed")):
        print(f"\n| {title} | " + " | ".join(f"{float(budget):.0%}" for budget in budgets) + " |")
        print("|---|" + "--:|" * len(budgets))
        for method, row in table.items():
            print(f"| {method} | " + " | ".join(f"{row[b][key][0]:.3f} ({row[b][key][1]:.3f})" for b in budgets) + " |")
    print()
    print_result({"table": table, "verdicts": print_verdicts(promises(reports, spent / scoring))})
    if minutes:
        print(f"minutes per run, including its report: {', '.join(f'{value:.1f}' for value in minutes)}")
    if config.drawing:
        draw, make, score = drawing_speed()
        print(f"scoring an example takes {score:.2f} ms: {score / draw:.1f}x the time to draw its picture, ", end="")
        print(f"{score / make:.1f}x the time to make the example")


if __name__ == "__main__":
    main()
