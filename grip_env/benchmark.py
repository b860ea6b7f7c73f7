"""Train with several seeds and measure what the project promises: ``python -m grip_env.benchmark``."""

from __future__ import annotations

import csv
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tyro

from grip_env.commands import check_agents_package, check_at_least

__all__ = ["Config", "drawing_speed", "main", "promises", "summary"]

GRID = (0.05, 0.1, 0.2, 0.3, 0.5)
RIVALS = ("uniform grid", "CLS attention", "max-min diversity")


@dataclass
class Config:
    """Train the default agent with several seeds, print means over them, and check each promise.

    Runs that have finished are not repeated, so that an interrupted benchmark goes on where it was.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds to train with."""
    runs: Path = Path("runs")
    """Where the runs ``benchmark-seed0``, ... are kept."""
    threads: int = 0
    """CPU threads; 0 leaves the choice to PyTorch."""
    examples: int = 1440
    """Test examples the means are over; runs reported on another number are compared again."""
    drawing: bool = True
    """Also compare the time to draw an example with the time to score it."""
    extra: tuple[str, ...] = field(default_factory=tuple)
    """Options of grip_env.train for every run, such as --grpo.steps=100."""


def summary(reports: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, tuple[float, float]]]]:
    """Return {method: {budget: {"log_likelihood" | "accuracy" | "gap": (mean, standard deviation over seeds)}}}."""
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


def promises(table: dict[str, dict[str, dict[str, tuple[float, float]]]], ratio: float) -> list[tuple[str, bool]]:
    """Check what the README says of the default agent; returns (statement with numbers, whether it holds)."""
    from grip_env.report import AGENT, WARMUP

    agent, checks = table[AGENT], []
    for budget in ("0.05", "0.1"):
        gap = agent[budget]["gap"][0]
        checks.append((f"{float(budget):.0%}: closes {gap:.0%} of the gap from random to oracle (>= 80%)", gap >= 0.8))
    for rival in RIVALS:
        margins = {b: agent[str(b)]["log_likelihood"][0] - table[rival][str(b)]["log_likelihood"][0] for b in GRID}
        worst = min(margins, key=lambda budget: margins[budget])
        text = f"beats {rival} from 5% to 50%; smallest margin {margins[worst]:+.3f} nats at {worst:.0%}"
        checks.append((text, margins[worst] > 0))
    for budget in ("0.05", "0.1"):
        (mine, spread), (before, before_spread) = (table[name][budget]["log_likelihood"] for name in (AGENT, WARMUP))
        gain, noise = mine - before, max(spread, before_spread)
        text = f"{float(budget):.0%}: GRPO gains {gain:+.3f} nats on its warm-up, seed spread {noise:.3f}"
        checks.append((text, gain > noise))
    checks.append((f"a GRPO step takes {ratio:.2f}x the scoring inside it (<= 1.5)", ratio <= 1.5))
    return checks


def drawing_speed(batches: int = 5, size: int = 48) -> tuple[float, float, float]:
    """Return milliseconds per example to draw its picture, to make all of it, and to score it.

    Making includes choosing scene, question and relevance; scoring includes the vision encoder. Medians over batches,
    each kind of work in a stretch of its own: PyTorch's threads go on spinning for a while after they have worked.
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
    config = tyro.cli(Config, description=Config.__doc__, prog="python -m grip_env.benchmark")
    check_agents_package()
    check_at_least(0, threads=config.threads)
    check_at_least(1, seeds=len(config.seeds), examples=config.examples)
    from grip_env import evaluate, train
    from grip_env.report import AGENT

    reports: list[dict[str, Any]] = []
    minutes: list[float] = []
    spent, scoring = 0.0, 0.0
    for seed in config.seeds:
        folder = config.runs / f"benchmark-seed{seed}"
        if not (folder / "report.json").is_file():
            options = tyro.cli(train.Config, args=list(config.extra))
            began = time.perf_counter()
            train.train(replace(options, seed=seed, name=folder.name, runs=config.runs, threads=config.threads))
            minutes.append((time.perf_counter() - began) / 60)
        result = json.loads((folder / "report.json").read_text())
        if result["examples"] != config.examples:
            evaluate.evaluate(evaluate.Config(folder, examples=config.examples, threads=config.threads))
            result = json.loads((folder / "report.json").read_text())
        reports.append(result)
        with (folder / "grpo.csv").open() as file:
            for line in csv.DictReader(file):
                spent += float(line["seconds"])
                scoring += float(line["scoring_seconds"])

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
    for text, holds in promises(table, spent / scoring):
        print(("holds   " if holds else "MISSED  ") + text)
    if minutes:
        print(f"minutes per run, its own report included: {', '.join(f'{value:.1f}' for value in minutes)}")
    if config.drawing:
        draw, make, score = drawing_speed()
        print(f"scoring an example takes {score:.2f} ms: {score / draw:.1f}x the time to draw its picture, ", end="")
        print(f"{score / make:.1f}x the time to make all of it")


if __name__ == "__main__":
    main()
