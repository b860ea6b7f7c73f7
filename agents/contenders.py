"""What can stand in a comparison, and how each kind is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from agents.base import Selector
from agents.heuristics.replacing import Replacement, Replacer
from agents.inside import InsidePruner
from grip_env.vlms.base import Encoded, FrozenVLM

__all__ = ["BudgetError", "Contender", "Outcome", "run_contender"]

Contender: TypeAlias = "Selector | Replacer | InsidePruner"
"""A selector of tokens, a method that puts other tokens in their place, or a pruner inside the language model."""


class BudgetError(ValueError):
    """A method cannot keep a budget."""


@dataclass(frozen=True)
class Outcome:
    """How the model answered B examples under a method that is no selector."""

    log_likelihood: torch.Tensor
    """float (B,)."""
    correct: torch.Tensor
    """bool (B,)."""
    spent: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """"tokens", how many were left at the end, and of pruners inside the language model "layer_average", how many there
    were on average over the layers, and "flops", the share of those without pruning; each (B,)."""


def run_contender(
    contender: Contender, vlm: FrozenVLM, encoded: Encoded, kept: torch.Tensor, generator: torch.Generator
) -> torch.Tensor | Outcome:
    """Let a method have its way with B examples.

    Args:
        contender: The method.
        vlm: The frozen model.
        encoded: B examples.
        kept: How many tokens each may keep, long (B,).
        generator: Source of any randomness, on the CPU.

    Returns:
        The selection of a selector, bool (B, N); what came of the others.

    Raises:
        BudgetError: If a pruner inside the language model cannot keep the budget.
    """
    if isinstance(contender, InsidePruner):
        try:
            result = contender.score(vlm, encoded, kept, generator)
        except ValueError as error:
            raise BudgetError(str(error)) from None
        spent = {"tokens": result.kept, "layer_average": result.layer_average, "flops": result.flops}
        return Outcome(result.scores.log_likelihood[:, 0], result.scores.correct[:, 0], spent)
    chosen = contender(vlm, encoded, kept, generator)
    if not isinstance(chosen, Replacement):
        return chosen
    scores = vlm.score(chosen.encoded, chosen.selection[:, None])
    return Outcome(scores.log_likelihood[:, 0], scores.correct[:, 0], {"tokens": chosen.selection.sum(1)})
