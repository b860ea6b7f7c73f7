"""Comparison of methods that reduce visual tokens, on the same examples."""

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
from grip_env.common.finite import NonFiniteError, name_of
from grip_env.reports.tables import AGENT, ALL_TOKENS, comparison_tables, margin_table

if TYPE_CHECKING:
    import torch

    from agents.base import Policy
    from agents.methods import Runnable
    from grip_env.tasks.base import Example, Task
    from grip_env.vlms.base import Encoded, FrozenVLM

__all__ = ["AGENT", "ALL_TOKENS", "BUDGETS", "WARMUP", "Comparison", "Margin", "compare"]

BUDGETS = (0.03, 0.05, 0.1, 0.2, 0.3, 0.5)
"""Budgets of the reports, as shares of the visual tokens."""

WARMUP = "its warm-up"

_BATCH = 48  # examples compared at a time


@dataclass(frozen=True)
class Margin:
    """Gain of one method over another on the same examples, in nats per answer token."""

    mean: float
    interval: float
    """Half width of the 95% interval of the mean over examples; the difficulty that both methods share cancels out."""
    worst: float
    """Smallest margin of a single seed; the mean itself if there is one seed."""

    @classmethod
    def of(cls, ours: np.ndarray, theirs: np.ndarray) -> Margin:
        """Return the margin of log-likelihoods over those of another method.

        Both are averaged over the seeds first. For the worst seed, the seeds are paired in the given order if both
        methods have the same number of them; otherwise each is compared with the other method's mean.

        Args:
            ours: Log-likelihoods, (seeds, examples).
            theirs: Log-likelihoods of the other method, (seeds, examples).
        """
        ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
        gains = ours.mean(0) - theirs.mean(0)  # (examples,)
        each = ours - (theirs if len(ours) == len(theirs) else theirs.mean(0))
        spread = gains.std(ddof=1) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
        return cls(float(gains.mean()), 1.96 * float(spread), float(each.mean(1).min()))

    @property
    def clear(self) -> bool:
        """True if the mean is above 0 by more than the interval."""
        return self.mean > self.interval


@dataclass
class Comparison:
    """Results of several methods on the same examples.

    ``cells[method][budget]`` holds "log_likelihood" and "accuracy", means over the examples; "log_likelihood_se", the
    standard error of the former; "families", the two means for each question family; and "tokens", the number of visual
    tokens left at the end. For methods that drop tokens inside the language model it also holds "layer_average", the
    number of visual tokens averaged over the layers, and "flops", the cost as a share of the cost without pruning. For
    a method trained with several seeds, the values are means over the seeds, and "log_likelihood_sd" and "accuracy_sd"
    are standard deviations over them. A budget that a method cannot keep is absent. ``log_likelihoods[method][budget]``
    holds the log-likelihoods of single examples, float32 (seeds, examples).
    """

    split: str
    examples: int
    tokens: float
    cells: dict[str, dict[float, dict[str, Any]]]
    log_likelihoods: dict[str, dict[float, np.ndarray]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """Results that are left out, with the reasons."""
    training: dict[str, dict[str, float]] = field(default_factory=dict)
    """Training cost of trained methods: "seconds" and "forwards", see :class:`~agents.pool.ForwardCounter`; empty where
    unknown."""
    positions: dict[str, str] = field(default_factory=dict)
    """Position policy of each method, "original" or "reindex"; absent where the model has none."""

    @property
    def budgets(self) -> list[float]:
        """All budgets of all methods, sorted."""
        return sorted({budget for row in self.cells.values() for budget in row})

    def value(self, method: str, budget: float, key: str = "log_likelihood") -> float:
        """Return one number of ``cells``."""
        return float(self.cells[method][budget][key])

    def gap_closed(self, method: str, budget: float) -> float | None:
        """Return the share of the gap from random to oracle that ``method`` closes.

        The gap is in log-likelihood. Returns ``None`` if one of the two is missing, or the oracle is not better.
        """
        if "oracle" not in self.cells or "random" not in self.cells:
            return None
        low, high = self.value("random", budget), self.value("oracle", budget)
        return (self.value(method, budget) - low) / (high - low) if high > low else None

    def margin(self, method: str, rival: str, budget: float) -> Margin:
        """Return the log-likelihood gain of ``method`` over ``rival``, see :meth:`Margin.of`."""
        return Margin.of(*(self.log_likelihoods[name][budget] for name in (method, rival)))

    def merged(self, groups: Mapping[str, Sequence[str]]) -> Comparison:
        """Return a copy in which the methods of each group, seeds of one method, are merged.

        Args:
            groups: Names of the groups, with the methods of each; methods without a group are unchanged.
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
        """Return the tables in Markdown."""
        return comparison_tables(self)

    def margins(self, method: str) -> str:
        """Return a table of the gains of ``method`` over all others, with 95% intervals."""
        return margin_table(self, method)

    def plain(self) -> dict[str, Any]:
        """Return the content of ``report.json``: all but the numbers of single examples."""
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
        """Write ``report.md``, ``report.json`` and ``report.safetensors`` into ``folder``.

        The last file holds the log-likelihoods of single examples.
        """
        write_atomically(folder / "report.md", self.markdown() + "\n")
        arrays = {
            f"{name}@{budget}": np.ascontiguousarray(values[0] if len(values) == 1 else values)
            for name, row in self.log_likelihoods.items()
            for budget, values in row.items()
        }
        write_atomically(folder / "report.safetensors", save(arrays))
        write_atomically(folder / "report.json", json.dumps(self.plain(), indent=2) + "\n")


def _mean(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean of the cells of several seeds."""
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
    """The results of one method at one budget, collected batch by batch."""

    def __init__(self) -> None:
        self.likelihood: list[np.ndarray] = []
        self.correct: list[np.ndarray] = []
        self.spent: dict[str, list[np.ndarray]] = {}

    def add(
        self,
        likelihood: torch.Tensor,
        correct: torch.Tensor,
        spent: Mapping[str, torch.Tensor],
        examples: Sequence[Example],
        method: str,
    ) -> None:
        bad = (~likelihood.isfinite()).nonzero()
        if len(bad):
            raise NonFiniteError(
                f"the answer's log-likelihood of {name_of(examples[int(bad[0])])} under {method} is NaN or infinite: "
                "check the model and its precision, or leave this example out of the data"
            )
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
    """Score methods at several budgets, and the full image, on the first examples of a split.

    Args:
        vlm: The frozen vision-language model.
        task: The task that provides the examples.
        methods: Methods to compare, by name: policies, token selectors, methods that replace tokens by others, or
            pruners inside the language model.
        split: The split; use "validation" for tuning.
        examples: Largest number of examples.
        budgets: Shares of tokens to keep. A budget that a pruner inside the language model cannot keep is left out for
            that pruner.
        seed: Random seed for methods that sample.
        progress: Show a progress bar.
    """
    import torch
    from tqdm import tqdm

    from agents.base import Policy, PolicySelector

    contestants = {name: PolicySelector(one) if isinstance(one, Policy) else one for name, one in methods.items()}
    examples = min(examples, task.size(split))
    # separate generators, so that the numbers of a method do not depend on the other methods
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
    usual = getattr(vlm, "position_policy", None)  # the default; pruners inside the model may have their own
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
    """Add the results of a batch to the columns, scoring all selections together.

    If a method cannot keep a budget, the pair is removed from ``generators`` and ``columns``, and added to ``refused``.
    """
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
            spent = outcome.spent
            columns[name, budget].add(outcome.log_likelihood, outcome.correct, spent, encoded.examples, name)
    selection = torch.stack(chosen, 1)  # (B, G, N)
    scores, left = vlm.score(encoded, selection), selection.sum(-1)
    for place, pair in enumerate(pairs, start=1):
        one = scores.log_likelihood[:, place], scores.correct[:, place], {"tokens": left[:, place]}
        columns[pair].add(*one, encoded.examples, pair[0])
    for (name, _), column in columns.items():
        if name == ALL_TOKENS:
            one = scores.log_likelihood[:, 0], scores.correct[:, 0], {"tokens": left[:, 0]}
            column.add(*one, encoded.examples, name)
