"""Comparing ways to get along with fewer visual tokens, on the same examples: numbers and tables."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from safetensors.numpy import save

from grip_env.common.atomic_files import write_atomically
from grip_env.reports.tables import AGENT, ALL_TOKENS, comparison_tables, margin_table

if TYPE_CHECKING:
    import torch

    from agents.base import Policy
    from agents.methods import Runnable
    from grip_env.tasks.base import Task
    from grip_env.vlms.base import Encoded, FrozenVLM

__all__ = ["AGENT", "ALL_TOKENS", "BUDGETS", "WARMUP", "Comparison", "Margin", "compare"]

BUDGETS = (0.03, 0.05, 0.1, 0.2, 0.3, 0.5)
"""Shares of tokens the reports look at."""

WARMUP = "its warm-up"

_BATCH = 48  # examples compared at a time


@dataclass(frozen=True)
class Margin:
    """By how much one method beats another on the same examples, in nats per answer token."""

    mean: float
    interval: float
    """Half width of the 95% interval of the mean over examples; what makes an example hard for both cancels out."""
    worst: float
    """The smallest margin of a single seed; the mean itself where there is one."""

    @classmethod
    def of(cls, ours: np.ndarray, theirs: np.ndarray) -> Margin:
        """Return the margin of log-likelihoods (seeds, examples), means over the seeds, over others (seeds, examples).

        Where both have as many seeds, the worst of them is of pairs in the order they were given.
        """
        ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
        gains = ours.mean(0) - theirs.mean(0)  # (examples,)
        each = ours - (theirs if len(ours) == len(theirs) else theirs.mean(0))
        spread = gains.std(ddof=1) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
        return cls(float(gains.mean()), 1.96 * float(spread), float(each.mean(1).min()))

    @property
    def clear(self) -> bool:
        """Whether the mean is above 0 by more than the interval."""
        return self.mean > self.interval


@dataclass
class Comparison:
    """Results of several methods on the same examples.

    ``cells[method][budget]`` holds "log_likelihood" and "accuracy", means over the examples, "log_likelihood_se", the
    standard error of that mean, "families", the same two means for each question family, "tokens", how many visual
    tokens are left at the end, and, of methods that drop tokens inside the language model, "layer_average", how many
    there are on average over its layers, and "flops", its cost as a share of that without pruning. A method trained
    with several seeds has means over them, and "log_likelihood_sd" and "accuracy_sd", standard deviations over them. A
    budget that a method cannot keep is absent. ``log_likelihoods[method][budget]`` are those of the single examples,
    float32 (seeds, examples).
    """

    split: str
    examples: int
    tokens: float
    cells: dict[str, dict[float, dict[str, Any]]]
    log_likelihoods: dict[str, dict[float, np.ndarray]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What is left out, and why."""
    training: dict[str, dict[str, float]] = field(default_factory=dict)
    """What trained methods took to train: "seconds" and "forwards", see :class:`~agents.pool.ForwardCounter`; empty
    where that is not known."""
    positions: dict[str, str] = field(default_factory=dict)
    """Position policy of each method, "original" or "reindex"; absent where the model does not say."""

    @property
    def budgets(self) -> list[float]:
        """The budgets, of all methods."""
        return sorted({budget for row in self.cells.values() for budget in row})

    def value(self, method: str, budget: float, key: str = "log_likelihood") -> float:
        """Return one number of the table."""
        return float(self.cells[method][budget][key])

    def gap_closed(self, method: str, budget: float) -> float | None:
        """Return how much of the way from random to the oracle's log-likelihood ``method`` gets; 1 is all of it."""
        if "oracle" not in self.cells or "random" not in self.cells:
            return None
        low, high = self.value("random", budget), self.value("oracle", budget)
        return (self.value(method, budget) - low) / (high - low) if high > low else None

    def margin(self, method: str, rival: str, budget: float) -> Margin:
        """Return by how much ``method`` beats ``rival`` in log-likelihood, see :meth:`Margin.of`."""
        return Margin.of(*(self.log_likelihoods[name][budget] for name in (method, rival)))

    def merged(self, groups: Mapping[str, Sequence[str]]) -> Comparison:
        """Return the same with the methods of each group, one trained with several seeds, as one.

        Args:
            groups: The name of each group and the methods in it; methods in none stay as they are.
        """
        owner = {name: group for group, names in groups.items() for name in names}
        cells: dict[str, dict[float, dict[str, Any]]] = {}
        single: dict[str, dict[float, np.ndarray]] = {}
        for name in dict.fromkeys(owner.get(name, name) for name in self.cells):
            members = list(groups.get(name, [name]))
            kept = [budget for budget in self.budgets if all(budget in self.cells[member] for member in members)]
            cells[name] = {budget: _mean([self.cells[member][budget] for member in members]) for budget in kept}
            single[name] = {
                budget: np.concatenate([self.log_likelihoods[member][budget] for member in members]) for budget in kept
            }
        positions = {owner.get(name, name): policy for name, policy in self.positions.items()}
        return Comparison(self.split, self.examples, self.tokens, cells, single, self.notes, positions=positions)

    def markdown(self) -> str:
        """Return the tables."""
        return comparison_tables(self)

    def margins(self, method: str) -> str:
        """Return a table of what ``method`` gains on each of the others, with 95% intervals."""
        return margin_table(self, method)

    def plain(self) -> dict[str, Any]:
        """Return what ``report.json`` has: all but the numbers of single examples."""
        return {
            "split": self.split,
            "examples": self.examples,
            "tokens": self.tokens,
            "cells": {name: {str(budget): cell for budget, cell in row.items()} for name, row in self.cells.items()},
            "notes": self.notes,
            "training": self.training,
            "positions": self.positions,
        }

    def save(self, folder: Path) -> None:
        """Write ``report.md``, ``report.json`` and, with the numbers of single examples, ``report.safetensors``."""
        write_atomically(folder / "report.md", self.markdown() + "\n")
        arrays = {
            f"{name}@{budget}": np.ascontiguousarray(values[0] if len(values) == 1 else values)
            for name, row in self.log_likelihoods.items()
            for budget, values in row.items()
        }
        write_atomically(folder / "report.safetensors", save(arrays))
        write_atomically(folder / "report.json", json.dumps(self.plain(), indent=2) + "\n")


def _mean(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean of cells of several seeds."""
    if len(cells) == 1:
        return cells[0]
    mean: dict[str, Any] = {}
    for key, first in cells[0].items():
        values = [cell[key] for cell in cells]
        mean[key] = (
            {kind: _mean([value[kind] for value in values]) for kind in first}
            if isinstance(first, dict)
            else float(np.mean(values))
        )
        if key in ("log_likelihood", "accuracy"):
            mean[f"{key}_sd"] = float(np.std(values, ddof=1))
    return mean


class _Column:
    """What one method did at one budget, batch by batch."""

    def __init__(self) -> None:
        self.likelihood: list[np.ndarray] = []
        self.correct: list[np.ndarray] = []
        self.spent: dict[str, list[np.ndarray]] = {}

    def add(self, likelihood: torch.Tensor, correct: torch.Tensor, spent: Mapping[str, torch.Tensor]) -> None:
        self.likelihood.append(likelihood.cpu().numpy())
        self.correct.append(correct.cpu().numpy())
        for key, value in spent.items():
            self.spent.setdefault(key, []).append(value.double().cpu().numpy())

    def cell(self, kinds: np.ndarray) -> dict[str, Any]:
        ll, right = np.concatenate(self.likelihood), np.concatenate(self.correct)
        return {
            "log_likelihood": float(ll.mean()),
            "log_likelihood_se": float(ll.std() / np.sqrt(len(ll))),
            "accuracy": float(right.mean()),
            "families": {
                str(kind): {
                    "log_likelihood": float(ll[kinds == kind].mean()),
                    "accuracy": float(right[kinds == kind].mean()),
                }
                for kind in dict.fromkeys(kinds.tolist())
            },
            **{key: float(np.concatenate(parts).mean()) for key, parts in self.spent.items()},
        }


class _Progress(Protocol):
    def update(self, n: int = 1) -> Any: ...


def compare(
    vlm: FrozenVLM,
    task: Task,
    methods: Mapping[str, Runnable | Policy],
    split: str = "test",
    examples: int = 480,
    budgets: Sequence[float] = BUDGETS,
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    """Score every method at every budget on the first ``examples`` examples of ``split``, and the full image.

    Args:
        vlm: The frozen model.
        task: Where the examples come from.
        methods: What to compare, by name: policies and selectors of tokens, methods that put other tokens in their
            place, or pruners inside the language model.
        split: Which split; use "validation" while you tune.
        examples: How many examples.
        budgets: Shares of tokens to keep; one that a pruner inside the language model cannot keep is left out for it.
        seed: For methods that draw at random.
        progress: Show a progress bar.
    """
    import torch
    from tqdm import tqdm

    from agents.base import Policy, PolicySelector

    contestants = {name: PolicySelector(one) if isinstance(one, Policy) else one for name, one in methods.items()}
    examples = min(examples, task.size(split))
    # one source of chance each, so that what else is compared does not change a method's numbers
    generators = {
        (name, budget): torch.Generator().manual_seed(seed + zlib.crc32(f"{name}@{budget}".encode()))
        for budget in budgets
        for name in contestants
    }
    columns = {pair: _Column() for pair in [*generators, *((ALL_TOKENS, budget) for budget in budgets)]}
    refused: dict[str, dict[float, str]] = {}
    kinds: list[str] = []
    tokens = 0
    starts = range(0, examples, _BATCH)
    with tqdm(
        total=len(starts) * len(generators),
        desc=f"comparing on {split}",
        unit="cell",
        disable=not progress,
        dynamic_ncols=True,
    ) as bar:
        for start in starts:
            batch = [task.example(split, index) for index in range(start, min(start + _BATCH, examples))]
            encoded = vlm.encode(batch)
            kinds += [example.family for example in batch]
            tokens += int(encoded.token_mask.sum())
            _run_batch(vlm, encoded, contestants, generators, columns, refused, bar)
    cells: dict[str, dict[float, dict[str, Any]]] = {name: {} for name in [*contestants, ALL_TOKENS]}
    single: dict[str, dict[float, np.ndarray]] = {name: {} for name in cells}
    for (name, budget), column in columns.items():
        cells[name][budget] = column.cell(np.array(kinds))
        single[name][budget] = np.concatenate(column.likelihood)[None]
    known = {name: row for name, row in cells.items() if row}
    notes = [
        f"{name} at {', '.join(f'{budget:.0%}' for budget in row)} ({next(iter(row.values()))})"
        for name, row in refused.items()
    ]
    usual = getattr(vlm, "position_policy", None)  # that of the model, but pruners inside it may have their own
    policies = {name: getattr(contestants.get(name), "position_policy", usual) for name in known}
    positions = {name: policy for name, policy in policies.items() if policy is not None}
    likelihoods = {name: single[name] for name in known}
    return Comparison(split, examples, tokens / examples, known, likelihoods, notes, positions=positions)


def _run_batch(
    vlm: FrozenVLM,
    encoded: Encoded,
    methods: Mapping[str, Runnable],
    generators: dict[tuple[str, float], torch.Generator],
    columns: dict[tuple[str, float], _Column],
    refused: dict[str, dict[float, str]],
    bar: _Progress,
) -> None:
    """Add a batch to the columns; selections are scored together. A pair that cannot be is taken out of all."""
    import torch

    from agents.base import budget_to_count
    from agents.methods import BudgetError, run_method

    chosen = [encoded.token_mask]
    pairs: list[tuple[str, float]] = []
    for (name, budget), generator in list(generators.items()):
        bar.update()
        try:
            outcome = run_method(methods[name], vlm, encoded, budget_to_count(encoded, budget), generator)
        except BudgetError as error:
            del generators[name, budget], columns[name, budget]
            refused.setdefault(name, {})[budget] = str(error)
            continue
        if isinstance(outcome, torch.Tensor):
            chosen.append(outcome)
            pairs.append((name, budget))
        else:
            columns[name, budget].add(outcome.log_likelihood, outcome.correct, outcome.spent)
    selection = torch.stack(chosen, 1)  # (B, G, N)
    scores, left = vlm.score(encoded, selection), selection.sum(-1)
    for place, pair in enumerate(pairs, start=1):
        columns[pair].add(scores.log_likelihood[:, place], scores.correct[:, place], {"tokens": left[:, place]})
    for (name, _), column in columns.items():
        if name == ALL_TOKENS:
            column.add(scores.log_likelihood[:, 0], scores.correct[:, 0], {"tokens": left[:, 0]})
