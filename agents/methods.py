"""Training-free methods by name, as given to ``evaluate --policies``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch

from agents.base import Selector
from agents.heuristics.attention import VisPruner, cls_attention, received_attention
from agents.heuristics.basic import feature_norm, oracle, random_tokens, uniform_grid
from agents.heuristics.diversity import CDPruner, max_min_diversity
from agents.heuristics.inside_llm import FastV, InsidePruner, PyramidDrop
from agents.heuristics.llm_scores import DARTScore, FastVScore, SparseVLMScore
from agents.heuristics.replacing import Replacement, Replacer, VisionZip, downsampled_image
from agents.search import CrossEntropy, GreedyBackward, GreedyForward, RandomSearch, Search, SwapSearch
from grip_env.vlms.base import Encoded, FrozenVLM

__all__ = [
    "METHODS",
    "BudgetError",
    "Method",
    "MethodResult",
    "Need",
    "Runnable",
    "find_method",
    "methods_table",
    "run_method",
]


Runnable: TypeAlias = "Selector | Replacer | InsidePruner"
"""A selector, a method that replaces tokens by new ones, or a pruner inside the language model."""


class BudgetError(ValueError):
    """Error raised if a method cannot keep a budget."""


@dataclass(frozen=True)
class MethodResult:
    """Answers of the model to B examples under a method that is not a selector."""

    log_likelihood: torch.Tensor
    """Log-likelihood of each answer, float (B,)."""
    correct: torch.Tensor
    """True where the answer is correct, bool (B,)."""
    spent: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Cost by name, each (B,): "tokens", the number left at the end; for pruners inside the language model also
    "layer_average", the mean number over the layers, and "flops", the share of the FLOPs without pruning."""


def run_method(
    method: Runnable, vlm: FrozenVLM, encoded: Encoded, counts: torch.Tensor, generator: torch.Generator
) -> torch.Tensor | MethodResult:
    """Run a method on B examples.

    Args:
        method: The method.
        vlm: The frozen model.
        encoded: B examples.
        counts: Number of tokens that each may keep, long (B,).
        generator: Source of any randomness, on the CPU.

    Returns:
        The selection of a selector, bool (B, N); for other methods, a :class:`MethodResult`.

    Raises:
        BudgetError: If a pruner inside the language model cannot keep the budget.
    """
    if isinstance(method, InsidePruner):
        try:
            result = method.score(vlm, encoded, counts, generator)
        except ValueError as error:
            raise BudgetError(str(error)) from None
        spent = {"tokens": result.kept, "layer_average": result.layer_average, "flops": result.flops}
        return MethodResult(result.scores.log_likelihood[:, 0], result.scores.correct[:, 0], spent)
    chosen = method(vlm, encoded, counts, generator)
    if not isinstance(chosen, Replacement):
        return chosen
    scores = vlm.score(chosen.encoded, chosen.selection[:, None])
    return MethodResult(scores.log_likelihood[:, 0], scores.correct[:, 0], {"tokens": chosen.selection.sum(1)})


Need = Literal[
    "CLS attention",
    "received attention",
    "question",
    "answer",
    "ground truth",
    "new tokens",
    "smaller images",
    "decoder layers",
]
"""Requirement of a method: attention of the vision tower, the words of the question, its answer, labels, a model that
accepts tokens with new features, one whose number of tokens depends on the image size, or one whose language model can
be run layer by layer."""


@dataclass(frozen=True)
class Method:
    """A training-free method of reducing the number of visual tokens."""

    title: str
    """Name in tables."""
    run: Runnable
    """A selector, a replacer (if the tokens themselves change), or a pruner inside the language model."""
    source: str
    """Source of the method; empty for common knowledge."""
    needs: tuple[Need, ...] = ()
    note: str = ""
    """Differences from the source, or a caveat."""

    @property
    def replaces(self) -> bool:
        """True if ``run`` returns a replacement of the tokens instead of a selection."""
        return {"new tokens", "smaller images"} & set(self.needs) != set()

    def refusal(self, vlm: FrozenVLM, encoded: Encoded) -> str | None:
        """Return why the method cannot run on these examples, or ``None`` if it can.

        Args:
            vlm: The model.
            encoded: Examples of the comparison; the method is tried on the first.
        """
        import torch

        first = encoded[:1]
        if "question" in self.needs and not bool(first.question_mask.any()):
            return f"{self.title} needs a question, and there is none"
        if "answer" in self.needs and not bool(first.answer_lengths.all()):
            return f"{self.title}, and there is no answer"
        if "ground truth" in self.needs and first.relevance() is None:
            return f"{self.title} needs the ground truth, which these examples do not have"
        count = first.token_mask.sum(1)
        try:
            if "decoder layers" in self.needs:  # a budget of all tokens can always be kept
                run_method(self.run, vlm, first, count, torch.Generator().manual_seed(0))
            elif {"CLS attention", "received attention", "new tokens", "smaller images"} & set(self.needs):
                run_method(self.run, vlm, first, torch.ones_like(count), torch.Generator().manual_seed(0))
        except (NotImplementedError, ValueError) as error:
            return f"{self.title} needs {' and '.join(self.needs)}: {error}"
        return None


FASTERVLM = 'Zhang et al., "[CLS] attention is all you need for training-free visual token pruning", 2024'
VISIONZIP = 'Yang et al., "VisionZip: longer is better but not necessary in vision language models", CVPR 2025'
FASTV = "Chen et al., ECCV 2024"
PYRAMIDDROP = "Xing et al., CVPR 2025"
BEFORE = "its score, applied before the language model; looks at its first layers, over all tokens"
MEAN = "inside the language model; the budget is the mean over its layers"
END = "inside the language model; the budget is what is left at the end, which costs more"


def _search(search: Search, source: str = "") -> Method:
    return Method(search.label, search, source, ("answer",), f"up to {search.calls} selections scored for each example")


METHODS: dict[str, Method] = {
    "random": Method("random", random_tokens, ""),
    "uniform-grid": Method("uniform grid", uniform_grid, ""),
    "norm": Method("feature norm", feature_norm, "", note="norm of the projected tokens"),
    "cls-attention": Method(
        "CLS attention",
        cls_attention,
        FASTERVLM,
        ("CLS attention",),
        "FasterVLM; VisionZip's dominant tokens are chosen by the same rule",
    ),
    "received-attention": Method(
        "received attention",
        received_attention,
        "",
        ("received attention",),
        "stands in for CLS attention where the tower has no CLS token",
    ),
    "visionzip": Method(
        "VisionZip",
        VisionZip(),
        VISIONZIP,
        ("CLS attention", "new tokens"),
        "merges tokens: not a selection; keeps the vlm's position policy, where the paper renumbers",
    ),
    "vispruner": Method(
        "VisPruner",
        VisPruner(),
        'Zhang et al., "Beyond text-visual attention: exploiting visual cues for effective token pruning in VLMs", '
        "ICCV 2025",
        ("CLS attention",),
        "half by attention, half by diversity, of the tower's features before the projector",
    ),
    "divprune": Method(
        "max-min diversity",
        max_min_diversity,
        'Alvar et al., "DivPrune: diversity-based visual token pruning for large multimodal models", CVPR 2025',
    ),
    "cdpruner": Method(
        "CDPruner",
        CDPruner(),
        'Zhang et al., "Beyond attention or similarity: maximizing conditional diversity for token pruning in MLLMs", '
        "NeurIPS 2025",
        ("question",),
        "relevance is the cosine of token and question words in the language model's input space, not CLIP's",
    ),
    "downsampled": Method(
        "down-sampled image",
        downsampled_image,
        "",
        ("smaller images",),
        "encodes a smaller image: not a selection; often some tokens fewer than the budget",
    ),
    "fastv-score": Method("FastV score", FastVScore(), FASTV, ("decoder layers",), BEFORE),
    "sparsevlm-score": Method(
        "SparseVLM score", SparseVLMScore(), "Zhang et al., ICML 2025", ("decoder layers", "question"), BEFORE
    ),
    "dart-score": Method("DART score", DARTScore(), "Wen et al., EMNLP 2025", ("decoder layers", "question"), BEFORE),
    "fastv": Method("FastV", FastV(), FASTV, ("decoder layers",), MEAN),
    "fastv-kept": Method("FastV (kept at the end)", FastV(budget_of="kept"), FASTV, ("decoder layers",), END),
    "pyramiddrop": Method("PyramidDrop", PyramidDrop(), PYRAMIDDROP, ("decoder layers",), MEAN),
    "pyramiddrop-kept": Method(
        "PyramidDrop (kept at the end)", PyramidDrop(budget_of="kept"), PYRAMIDDROP, ("decoder layers",), END
    ),
    "oracle": Method("oracle", oracle, "", ("ground truth",), "uses the ground truth"),
    "random-search": _search(RandomSearch(64)),
    "greedy-forward": _search(GreedyForward()),
    "greedy-backward": _search(GreedyBackward()),
    "swap-search": _search(SwapSearch()),
    "cross-entropy": _search(CrossEntropy(), "De Boer et al., Annals of Operations Research 2005"),
}
"""Methods by their command-line name; "oracle" uses the ground truth, and those after it use the answer."""


def find_method(name: str) -> Method:
    """Return a method by its name on the command line.

    Raises:
        ValueError: If there is no method of this name.
    """
    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}: choose from {', '.join(METHODS)}")
    return METHODS[name]


def methods_table() -> str:
    """Return a Markdown table of all methods with their names, needs, sources and notes."""
    lines = ["| name | in tables | needs | source and notes |", "|---|---|---|---|"]
    for name, one in METHODS.items():
        notes = "; ".join(part for part in (one.source, one.note) if part)
        lines.append(f"| `{name}` | {one.title} | {', '.join(one.needs)} | {notes} |")
    return "\n".join(lines)
