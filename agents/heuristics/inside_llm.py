"""FastV and PyramidDrop as published: visual tokens leave *inside* the language model, between its layers.

A method that keeps k tokens from some layer on has spent more than one that lets k tokens in: all tokens went through
the layers before. So "k tokens" is two things here, and ``budget_of`` says which is meant:

- ``"layers"`` (default): the mean over all layers of the visual tokens present is at most k. The language model then
  spends on them about what it spends on k tokens chosen before it, and results may stand in one table.
- ``"kept"``: k tokens are left at the end, as papers quote it. That costs more, so results belong in a table of their
  own, or beside ``InsideScores.flops``.

A budget of layers cannot be below what the layers before the first drop take: FastV before layer 2 of 4 spends half of
everything before it drops anything. Such a budget is refused, never exceeded.

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
"""Whether a budget is the mean over the layers, or what is left at the end."""
PositionPolicy: TypeAlias = Literal["original", "reindex"]
"""Whether what stays keeps its position, or is renumbered: a choice of each method, whatever the model's own is."""


@dataclass(frozen=True)
class InsideScores:
    """How a model answers that drops tokens between its layers, and what that cost."""

    scores: Scores
    """Fields of shape (B, 1); ``kept`` is the mean over the layers of the share of the tokens present."""
    selection: torch.Tensor
    """Which visual tokens are left at the end, bool (B, N)."""
    layer_average: torch.Tensor
    """Visual tokens present, mean over the layers, float32 (B,): k of a selector that costs the same."""
    flops: torch.Tensor
    """FLOPs of the language model over the prompt, as a share of those with nothing dropped, float32 (B,), in (0, 1].

    Attention of the layers is counted, and so is the head; the ranking, a fraction of one layer's attention, is not."""

    @property
    def kept(self) -> torch.Tensor:
        """How many visual tokens are left at the end, long (B,)."""
        return self.selection.sum(1)


@runtime_checkable
class InsidePruner(Protocol):
    """Anything that drops tokens while the language model runs: it cannot be a selector, so it scores by itself."""

    def score(self, vlm: FrozenVLM, encoded: Encoded, counts: torch.Tensor, generator: torch.Generator) -> InsideScores:
        """Answer under a budget.

        Args:
            vlm: The model the examples were encoded with.
            encoded: B examples, with answers.
            counts: How many tokens the budget allows of each, long (B,); what that counts is for the method to say.
            generator: Source of any randomness, on the CPU.

        Raises:
            NotImplementedError: If the layers of the model cannot be run one by one.
            ValueError: If the budget cannot be kept.
        """
        ...


@dataclass(frozen=True)
class FastV:
    """Drops once, before layer K: what the last token of the prompt attended to least in layer K - 1.

    Attention is the mean over heads; layers count from 0; of equals the lower index stays. What stays keeps its
    position, as in the published code.

    Source: Chen et al., "An image is worth 1/2 tokens after layer 2: plug-and-play inference acceleration for large
    vision-language models", ECCV 2024, arXiv 2403.06764.
    """

    layer: int = 2
    """K, from 1 to the number of layers - 1."""
    budget_of: BudgetOf = "layers"
    """What a budget counts; see the module."""
    position_policy: PositionPolicy = "original"
    """Whether what stays keeps its position, or is renumbered at the drop."""

    def plan(self, layers: int, count: int, k: int) -> tuple[int, ...]:
        """Return how many tokens stay after the drop, as a tuple of one.

        Args:
            layers: Of the language model.
            count: n, visual tokens of the image.
            k: The budget.

        Raises:
            ValueError: If ``budget_of`` is "layers" and the layers before the drop spend it; if K is no such layer.

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
        seen = run.attention()  # of layer K - 1, before it runs: the states that go into it
        run.advance(self.layer)
        run.drop(top_k(seen, plans[:, 0], run.alive))
        return _finish(run, vlm, encoded, PruningSchedule((self.layer,), run.layers), plans)


@dataclass(frozen=True)
class PyramidDrop:
    """Drops in stages: before each of some layers, what the last token of the prompt attends to least in that layer.

    Attention is the mean over heads; layers count from 0; of equals the lower index stays. Published for 32 layers:
    drops before layers 8, 16 and 24, which leave 1/2, 1/4 and 1/8 of the tokens, 0.469 on average over the layers. The
    first three quarters of the depth are its layers here at any depth, unless they are given.

    What stays is renumbered at every drop, as in the published code.

    Source: Xing et al., "PyramidDrop: accelerating your large vision-language models via pyramid visual redundancy
    reduction", CVPR 2025, arXiv 2410.17247.
    """

    layers: tuple[int, ...] | None = None
    """Before which layers tokens leave, strictly increasing, from 1; ``None``: before a quarter, a half and three
    quarters of the layers (each rounded half up, as far as they differ)."""
    ratios: tuple[float, ...] | None = None
    """Which share of the image's tokens each drop leaves, rounded down, one at least; the published ones are
    (0.5, 0.25, 0.125). ``None``: every drop leaves the same share of what is there, the largest the budget allows."""
    budget_of: BudgetOf = "layers"
    """What a budget counts; see the module."""
    position_policy: PositionPolicy = "reindex"
    """Whether what stays keeps its position, or is renumbered at every drop."""

    def stages(self, layers: int) -> tuple[int, ...]:
        """Return before which of so many layers tokens leave.

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
            layers: Of the language model.
            count: n, visual tokens of the image.
            k: The budget.

        Raises:
            ValueError: If the budget cannot be kept; if layers or ratios are none.

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
        low, high = 0.0, 1.0  # the share each drop leaves of what is there
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
    """Return what drops leave that each leave a share of what is there, rounded down, one at least."""
    # a root taken to its power again may be a hair below a whole number
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
    """Begin a pass over prompts and answers; a refusal names who asked."""
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
    """Run what is left, score the answers and count what it cost."""
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
