"""Comparing ways to choose tokens: tables, the budget curve and the gallery of what was kept."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

if TYPE_CHECKING:
    from agents.base import Selector
    from grip_env.tasks.base import Task
    from grip_env.vlms.base import Encoded, FrozenVLM

__all__ = ["AGENT", "ALL_TOKENS", "BUDGETS", "WARMUP", "Comparison", "compare", "draw_curve", "draw_gallery"]

BUDGETS = (0.03, 0.05, 0.1, 0.2, 0.3, 0.5)
"""Shares of tokens the reports look at."""

ALL_TOKENS = "all tokens"
AGENT = "this agent"
WARMUP = "its warm-up"


@dataclass
class Comparison:
    """Results of several methods on the same examples.

    ``cells[method][budget]`` holds "log_likelihood" and "accuracy", means over the examples, "log_likelihood_se",
    the standard error of that mean, and "families", the same two means for each question family;
    ``log_likelihoods[method][budget]`` those of the single examples, float32 (examples,).
    """

    split: str
    examples: int
    tokens: float
    cells: dict[str, dict[float, dict[str, Any]]]
    log_likelihoods: dict[str, dict[float, np.ndarray]] = field(default_factory=dict)

    def value(self, method: str, budget: float, key: str = "log_likelihood") -> float:
        """Return one number of the table."""
        return float(self.cells[method][budget][key])

    def gap_closed(self, method: str, budget: float) -> float | None:
        """Return how much of the way from random to the oracle's log-likelihood ``method`` gets; 1 is all of it."""
        if "oracle" not in self.cells or "random" not in self.cells:
            return None
        low, high = self.value("random", budget), self.value("oracle", budget)
        return (self.value(method, budget) - low) / (high - low) if high > low else None

    def markdown(self) -> str:
        """Return the tables."""
        budgets = list(next(iter(self.cells.values())))
        head = "| method | " + " | ".join(f"{budget:.0%} ({round(budget * self.tokens)})" for budget in budgets) + " |"
        rule = "|---|" + "--:|" * len(budgets)
        lines = [f"{self.examples} examples of the {self.split} split, {self.tokens:.0f} visual tokens each."]
        for key, title in (
            ("log_likelihood", "Answer log-likelihood (nats per answer token)"),
            ("accuracy", "Accuracy (exact match)"),
        ):
            lines += ["", f"**{title}** by budget (tokens kept)", "", head, rule]
            for method in self.cells:
                values = " | ".join(f"{self.value(method, budget, key):.3f}" for budget in budgets)
                lines.append(f"| {method} | {values} |")
        gaps = [self.gap_closed(AGENT, budget) for budget in budgets] if AGENT in self.cells else []
        if any(gap is not None for gap in gaps):
            shown = " | ".join("-" if gap is None else f"{gap:.0%}" for gap in gaps)
            lines += ["", f"Gap between random and oracle log-likelihood closed by {AGENT}:", "", head, rule]
            lines.append(f"| {AGENT} | {shown} |")
        return "\n".join(lines)

    def save(self, folder: Path) -> None:
        """Write ``report.md``, ``report.json`` and, with the numbers of single examples, ``report.safetensors``."""
        (folder / "report.md").write_text(self.markdown() + "\n")
        plain = {
            "split": self.split,
            "examples": self.examples,
            "tokens": self.tokens,
            "cells": {name: {str(budget): cell for budget, cell in row.items()} for name, row in self.cells.items()},
        }
        arrays = {
            f"{name}@{budget}": np.ascontiguousarray(values)
            for name, row in self.log_likelihoods.items()
            for budget, values in row.items()
        }
        save_file(arrays, folder / "report.safetensors")
        (folder / "report.json").write_text(json.dumps(plain, indent=2) + "\n")


def compare(
    vlm: FrozenVLM,
    task: Task,
    selectors: Mapping[str, Selector],
    split: str = "test",
    examples: int = 480,
    budgets: Sequence[float] = BUDGETS,
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    """Score every selector at every budget on the first ``examples`` examples of ``split``, and the full image.

    Args:
        vlm: The frozen model.
        task: Where the examples come from.
        selectors: What to compare, by name.
        split: Which split; use "validation" while you tune.
        examples: How many examples.
        budgets: Shares of tokens to keep.
        seed: For selectors that draw at random.
        progress: Show a progress bar.
    """
    import torch
    from tqdm import tqdm

    from agents.base import budget_to_count

    examples = min(examples, task.size(split))
    pairs = [(name, budget) for budget in budgets for name in selectors]
    # one source of chance each, so that what else is compared does not change a method's numbers
    generators = [
        torch.Generator().manual_seed(seed + zlib.crc32(f"{name}@{budget}".encode())) for name, budget in pairs
    ]
    likelihood: list[np.ndarray] = []
    correct: list[np.ndarray] = []
    families: list[str] = []
    tokens = 0
    starts = range(0, examples, 48)
    for start in tqdm(starts, desc=f"comparing on {split}", unit="batch", disable=not progress, dynamic_ncols=True):
        batch = [task.example(split, index) for index in range(start, min(start + 48, examples))]
        encoded = vlm.encode(batch)
        families += [example.family for example in batch]
        tokens += int(encoded.token_mask.sum())
        chosen = [encoded.token_mask]
        for (name, budget), generator in zip(pairs, generators, strict=True):
            chosen.append(selectors[name](vlm, encoded, budget_to_count(encoded, budget), generator))
        scores = vlm.score(encoded, torch.stack(chosen, 1))
        likelihood.append(scores.log_likelihood.cpu().numpy())
        correct.append(scores.correct.cpu().numpy())
    ll, right = np.concatenate(likelihood), np.concatenate(correct)
    kinds = np.array(families)

    def cell(column: int) -> dict[str, Any]:
        return {
            "log_likelihood": float(ll[:, column].mean()),
            "log_likelihood_se": float(ll[:, column].std() / np.sqrt(len(ll))),
            "accuracy": float(right[:, column].mean()),
            "families": {
                kind: {
                    "log_likelihood": float(ll[kinds == kind, column].mean()),
                    "accuracy": float(right[kinds == kind, column].mean()),
                }
                for kind in dict.fromkeys(families)
            },
        }

    columns = {pair: column for column, pair in enumerate(pairs, start=1)}
    columns |= {(ALL_TOKENS, budget): 0 for budget in budgets}
    cells: dict[str, dict[float, dict[str, Any]]] = {}
    single: dict[str, dict[float, np.ndarray]] = {}
    for (name, budget), column in columns.items():
        cells.setdefault(name, {})[budget] = cell(column)
        single.setdefault(name, {})[budget] = ll[:, column]
    return Comparison(split, examples, tokens / examples, cells, single)


def draw_curve(comparison: Comparison, path: Path) -> None:
    """Draw log-likelihood and accuracy over the budget, one line per method, and write the picture to ``path``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    colours = {AGENT: "#d1495b", WARMUP: "#e8a0a9", "oracle": "#2e7d5b", ALL_TOKENS: "#555555"}
    others = iter(("#b8bec7", "#8d99ae", "#5c80bc", "#c79a3b", "#8e6c8a", "#4f9d9d"))
    for axes, key, label in zip(
        figure.subplots(1, 2),
        ("log_likelihood", "accuracy"),
        ("answer log-likelihood (nats per token)", "accuracy"),
        strict=True,
    ):
        for method, row in comparison.cells.items():
            colour = colours.setdefault(method, next(others, "#999999"))
            budgets = list(row)
            values = [row[budget][key] for budget in budgets]
            if method == ALL_TOKENS:
                axes.axhline(values[0], color=colour, linestyle=":", linewidth=1.3, label=method)
                continue
            main = method == AGENT
            axes.plot(
                budgets,
                values,
                color=colour,
                marker="o",
                markersize=5 if main else 3.5,
                linewidth=2.6 if main else 1.5,
                linestyle="--" if method in ("oracle", WARMUP) else "-",
                label="oracle (ground truth)" if method == "oracle" else method,
                zorder=3 if main else 2,
            )
        axes.set_xscale("log")
        axes.set_xticks(budgets, [f"{budget:.0%}" for budget in budgets])
        axes.minorticks_off()
        axes.set_xlabel("visual tokens kept")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[1].legend(frameon=False, fontsize=9, loc="lower right")
    figure.suptitle(f"{comparison.examples} held-out examples ({comparison.split} split)", fontsize=11)
    figure.savefig(path, dpi=130)


def draw_gallery(
    vlm: FrozenVLM,
    encoded: Encoded,
    selector: Selector,
    budgets: Sequence[float] = (0.03, 0.05, 0.1, 0.2),
    title: str = "What the agent keeps",
    seed: int = 0,
) -> np.ndarray:
    """Draw what ``selector`` keeps of each example (rows) at each budget (columns): uint8 (height, width, 3)."""
    import torch

    from agents.base import budget_to_count
    from grip_env.envs.rendering import Panel, draw_selection, gallery

    generator = torch.Generator().manual_seed(seed)
    masks = [selector(vlm, encoded, budget_to_count(encoded, budget), generator) for budget in budgets]
    selection = torch.stack([encoded.token_mask, *masks], 1)
    answers = vlm.generate(encoded, selection, max_new_tokens=6)
    likelihood = vlm.score(encoded, selection).log_likelihood.exp()
    panels: list[list[Panel | np.ndarray | None]] = []
    for row, example in enumerate(encoded.examples):
        real = encoded.token_mask[row].cpu().numpy()
        places = encoded.positions[row].cpu().numpy()[real]
        cells = None if encoded.cells is None else encoded.cells[row].cpu().numpy()[real]
        line: list[Panel | np.ndarray | None] = []
        for column in range(selection.shape[1]):
            kept = None if column == 0 else selection[row, column].cpu().numpy()[real]
            picture = draw_selection(example.image, places, kept, size=288, cells=cells)
            given = answers[row][column]
            verdict = "right" if given == example.answer else f"wrong: {example.answer}"
            caption = f"{given or '(nothing)'} ({verdict}), p = {float(likelihood[row, column]):.2f}"
            line.append(Panel(picture, example.question if column == 0 else caption))
        panels.append(line)
    columns = ["the question", *(f"{budget:.0%} kept" for budget in budgets)]
    return gallery(panels, [example.family for example in encoded.examples], columns, title=title, size=288)
