"""FastV and PyramidDrop as published: they drop visual tokens *inside* the language model.

A method that keeps k tokens from some layer on costs more than one that passes k tokens to the model, because all
tokens go through the earlier layers. A budget of k tokens can therefore mean two things, and ``budget_of`` chooses one:

- ``"layers"`` (default): the number of visual tokens present, averaged over all layers, is at most k. The language
  model then spends about as much on them as on k tokens chosen before it, so the results fit in one table.
- ``"kept"``: k tokens are left at the end, as papers quote it. This costs more, so the results belong in a separate
  table, or beside ``InsideScores.flops``.

A budget of layers cannot be below the cost of the layers before the first drop: FastV before layer 2 of 4 spends half
of the full cost before it drops anything. Such a budget raises an error and is never exceeded.

B examples, N visual tokens, n of them real, T drops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch

from agents.base import top_k
from grip_env.envs.pruning_schedule import PruningSchedule
from grip_env.vlms.base import Encoded, FrozenVLM, Scores
from grip_env.vlms.flops import flops_saved

if TYPE_CHECKING:
    from grip_env.vlms.decoder.staged_forward import StagedForward

__all__ = ["BudgetOf", "FastV", "InsidePruner", "InsideScores", "PyramidDrop"]

BudgetOf: TypeAlias = Literal["layers", "kept"]
"""Meaning of a budget: tokens present, averaged over the layers, or tokens left at the end."""
PositionPolicy: TypeAlias = Literal["original", "reindex"]
"""Positions of the remaining tokens, original or renumbered: set by each method, whatever the model's own policy."""


@dataclass(frozen=True)
class InsideScores:
    """Scores of a model that drops tokens between its layers, and their cost."""

    scores: Scores
    """Fields of shape (B, 1); ``kept`` is the share of the tokens present, averaged over the layers."""
    selection: torch.Tensor
    """Visual tokens that are left at the end, bool (B, N)."""
    layer_average: torch.Tensor
    """Number of visual tokens present, averaged over the layers, float32 (B,): k of a selector of equal cost."""
    flops: torch.Tensor
    """FLOPs of the language model over the prompt, as a share of the cost without drops, float32 (B,), in (0, 1].

    The attention of the layers and the head are counted. The ranking, a fraction of one layer's attention, is not."""

    @property
    def kept(self) -> torch.Tensor:
        """Number of visual tokens left at the end, long (B,)."""
        return self.selection.sum(1)


@runtime_checkable
class InsidePruner(Protocol):
    """Interface of methods that drop tokens while the language model runs.

    Such a method cannot be a selector, so it scores the answers itself.
    """

    def score(self, vlm: FrozenVLM, encoded: Encoded, counts: torch.Tensor, generator: torch.Generator) -> InsideScores:
        """Answer under a budget.

        Args:
            vlm: The model the examples were encoded with.
            encoded: B examples, with answers.
            counts: Budget of each example in tokens, long (B,); its meaning depends on the method.
            generator: Source of any randomness, on the CPU.

        Raises:
            NotImplementedError: If the layers of the model cannot be run one by one.
            ValueError: If the budget cannot be met.
        """
        ...


@dataclass(frozen=True)
class FastV:
    """Method that drops once, before layer K, the tokens of least attention in layer K - 1.

    The attention is from the last token of the prompt, averaged over heads. Layers count from 0; ties keep the lower
    index. The remaining tokens keep their positions, as in the published code.

    Source: Chen et al., "An image is worth 1/2 tokens after layer 2: plug-and-play inference acceleration for large
    vision-language models", ECCV 2024, arXiv 2403.06764.
    """

    layer: int = 2
    """K, from 1 to the number of layers - 1."""
    budget_of: BudgetOf = "layers"
    """Meaning of the budget; see the module."""
    position_policy: PositionPolicy = "original"
    """Positions of the remaining tokens: original, or renumbered at the drop."""

    def plan(self, layers: int, count: int, k: int) -> tuple[int, ...]:
        """Return how many tokens stay after the drop, as a tuple of one.

        Args:
            layers: Number of layers of the language model.
            count: n, visual tokens of the image.
            k: The budget.

        Raises:
            ValueError: If ``budget_of`` is "layers" and the layers before the drop use up the budget, or if K is out of
                range.

        >>> FastV().plan(layers=32, count=576, k=192)  # (32 * 192 - 2 * 576) / 30
        (166,)
        >>> FastV(budget_of="kept").plan(layers=32, count=576, k=192)
        (192,)
        """
        _check_drops("FastV", (self.layer,), layers)
        _check_budget_of(self.budget_of)
        if self.budget_of == "kept":
            return (min(k, count),)
        schedule = PruningSchedule((self.layer,), layers)
        _check_total("FastV", schedule, k, count)
        return (schedule.allowance(count, k, []),)

    @torch.no_grad()
    def score(self, vlm: FrozenVLM, encoded: Encoded, counts: torch.Tensor, generator: torch.Generator) -> InsideScores:
        """Answer under a budget; see :class:`InsidePruner`."""
        run = _begin("FastV", vlm, encoded, self.position_policy)
        plans = _plans(encoded, counts, lambda count, budget: self.plan(run.layers, count, budget))
        run.advance(self.layer - 1)
        seen = run.attention()  # in layer K - 1, computed from its input before it runs
        run.advance(self.layer)
        run.drop(top_k(seen, plans[:, 0], run.alive))
        return _finish(run, vlm, encoded, PruningSchedule((self.layer,), run.layers), plans)


@dataclass(frozen=True)
class PyramidDrop:
    """Method that drops, before each of several layers, the tokens of least attention in it.

    The attention is from the last token of the prompt, averaged over heads. Layers count from 0; ties keep the lower
    index. The published method, for 32 layers, drops before layers 8, 16 and 24 and leaves 1/2, 1/4 and 1/8 of the
    tokens, 0.469 on average over the layers. Here the default is to drop after each of the first three quarters of the
    layers, at any depth.

    The remaining tokens are renumbered at every drop, as in the published code.

    Source: Xing et al., "PyramidDrop: accelerating your large vision-language models via pyramid visual redundancy
    reduction", CVPR 2025, arXiv 2410.17247.
    """

    layers: tuple[int, ...] | None = None
    """Layers before which tokens are dropped, strictly increasing, from 1. ``None``: one quarter, one half and three
    quarters of the depth, each rounded half up and without repeats."""
    ratios: tuple[float, ...] | None = None
    """Share of the image's tokens that each drop leaves, rounded down, at least one token; (0.5, 0.25, 0.125) as
    published. ``None``: each drop leaves the same share of the present tokens, the largest that the budget allows."""
    budget_of: BudgetOf = "layers"
    """Meaning of the budget; see the module."""
    position_policy: PositionPolicy = "reindex"
    """Positions of the remaining tokens: original, or renumbered at every drop."""

    def stages(self, layers: int) -> tuple[int, ...]:
        """Return the layers before which a model of ``layers`` layers drops tokens.

        >>> PyramidDrop().stages(32), PyramidDrop().stages(4), PyramidDrop().stages(2)
        ((8, 16, 24), (1, 2, 3), (1,))
        """
        if self.layers is not None:
            return self.layers
        quarters = {(2 * layers * part + 4) // 8 for part in (1, 2, 3)}
        return tuple(sorted({min(max(layer, 1), layers - 1) for layer in quarters}))

    def plan(self, layers: int, count: int, k: int) -> tuple[int, ...]:
        """Return how many tokens stay after each drop.

        Args:
            layers: Number of layers of the language model.
            count: n, visual tokens of the image.
            k: The budget.

        Raises:
            ValueError: If the budget cannot be met, or the layers or ratios are invalid.

        >>> PyramidDrop(ratios=(0.5, 0.25, 0.125)).plan(layers=32, count=576, k=288)
        (288, 144, 72)
        >>> PyramidDrop().plan(layers=32, count=576, k=192)
        (146, 37, 9)
        >>> PyramidDrop(budget_of="kept").plan(layers=32, count=576, k=72)
        (288, 144, 72)
        """
        stages = self.stages(layers)
        _check_drops("PyramidDrop", stages, layers)
        _check_budget_of(self.budget_of)
        try:
            schedule = PruningSchedule(stages, layers, self.ratios)
        except ValueError as error:
            raise ValueError(f"PyramidDrop cannot have the layers {stages} and ratios {self.ratios}: {error}") from None
        if self.ratios is not None:
            return self._fixed(schedule, count, k)
        if self.budget_of == "kept":
            k = min(k, count)
            share = (k / count) ** (1 / len(stages))
            return (*_geometric(count, share, len(stages) - 1), k)
        _check_total("PyramidDrop", schedule, k, count)
        if count <= k:
            return (count,) * len(stages)
        low, high = 0.0, 1.0  # share of the present tokens that each drop leaves
        for _ in range(60):
            middle = (low + high) / 2
            fits = schedule.spent(count, _geometric(count, middle, len(stages))) <= layers * k
            low, high = (middle, high) if fits else (low, middle)
        return tuple(_geometric(count, low, len(stages)))

    def _fixed(self, schedule: PruningSchedule, count: int, k: int) -> tuple[int, ...]:
        assert self.ratios is not None
        stay = tuple(max(1, math.floor(ratio * count)) for ratio in self.ratios)
        spent = schedule.spent(count, stay)
        if self.budget_of == "layers" and spent > schedule.layers * k:
            raise ValueError(
                f"PyramidDrop with the ratios {self.ratios} before the layers {schedule.stages} of {schedule.layers} "
                f"has {spent / schedule.layers:.4g} of {count} visual tokens present on average, more than the budget "
                f"of {k}: give another budget or other ratios, or none, which fits them to the budget"
            )
        if self.budget_of == "kept" and stay[-1] > k:
            raise ValueError(
                f"PyramidDrop with the ratios {self.ratios} leaves {stay[-1]} of {count} visual tokens, more than the "
                f"budget of {k}: give another budget or other ratios, or none, which fits them to the budget"
            )
        return stay

    @torch.no_grad()
    def score(self, vlm: FrozenVLM, encoded: Encoded, counts: torch.Tensor, generator: torch.Generator) -> InsideScores:
        """Answer under a budget; see :class:`InsidePruner`."""
        run = _begin("PyramidDrop", vlm, encoded, self.position_policy)
        plans = _plans(encoded, counts, lambda count, budget: self.plan(run.layers, count, budget))
        stages = self.stages(run.layers)
        for stage, layer in enumerate(stages):
            run.advance(layer)
            run.drop(top_k(run.attention(), plans[:, stage], run.alive))
        return _finish(run, vlm, encoded, PruningSchedule(stages, run.layers), plans)


def _geometric(count: int, share: float, drops: int) -> list[int]:
    """Return how many tokens are left after each drop, if each leaves the same share of them.

    Numbers are rounded down and at least 1.
    """
    # floating-point error may put a root raised to its power just below a whole number
    return [max(1, math.floor(count * share ** (drop + 1) + 1e-9)) for drop in range(drops)]


def _check_budget_of(budget_of: str) -> None:
    if budget_of not in ("layers", "kept"):
        raise ValueError(f"budget_of must be 'layers' or 'kept', not {budget_of!r}")


def _check_drops(name: str, stages: Sequence[int], layers: int) -> None:
    if any(not 1 <= stage < layers for stage in stages):
        raise ValueError(
            f"{name} can drop before the layers 1 to {layers - 1} of a language model of {layers}, where attention has "
            f"been seen; got {tuple(stages)}"
        )


def _check_total(name: str, schedule: PruningSchedule, k: int, count: int) -> None:
    try:
        schedule.check_total(k, count)
    except ValueError as error:
        raise ValueError(
            f"{name} cannot keep this budget: {error}; or count what is left at the end, budget_of='kept' "
            f"(--policies {name.lower()}-kept), which costs more than k tokens do"
        ) from None


def _begin(name: str, vlm: FrozenVLM, encoded: Encoded, position_policy: PositionPolicy) -> StagedForward:
    """Begin a pass over prompts and answers; errors name the method."""
    from grip_env.vlms.decoder.staged_forward import StagedForward  # loads transformers

    try:
        return StagedForward(vlm, encoded, position_policy=position_policy)  # type: ignore[arg-type] # refused there
    except NotImplementedError as error:
        raise NotImplementedError(f"{name}: {error}") from None


def _plans(encoded: Encoded, counts: torch.Tensor, plan: Callable[[int, int], tuple[int, ...]]) -> torch.Tensor:
    """Return how many tokens of each example stay after each drop, long (B, T)."""
    pairs = list(zip(encoded.token_mask.sum(1).tolist(), counts.tolist(), strict=True))
    known = {pair: plan(*pair) for pair in set(pairs)}
    return torch.tensor([known[pair] for pair in pairs], device=encoded.token_mask.device)


def _finish(
    run: StagedForward, vlm: Any, encoded: Encoded, schedule: PruningSchedule, plans: torch.Tensor
) -> InsideScores:
    """Run the remaining layers, score the answers and count the cost."""
    scores, totals = run.finish(), encoded.token_mask.sum(1)
    prompts = (encoded.lengths - encoded.answer_lengths).tolist()
    rows = list(zip(prompts, totals.tolist(), plans.tolist(), strict=True))
    saved = [
        flops_saved(vlm.model.config, prompt, schedule.lengths(prompt - count, count, stay))
        for prompt, count, stay in rows
    ]
    return InsideScores(
        scores=scores,
        selection=run.alive,
        layer_average=scores.kept[:, 0] * totals,
        flops=1 - torch.tensor(saved, device=totals.device),
    )
