"""The methods by name: what ``--policies a,b,c`` can name, where each comes from and what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from agents.base import Selector
from agents.heuristics.attention import VisPruner, cls_attention, received_attention
from agents.heuristics.basic import feature_norm, oracle, random_tokens, uniform_grid
from agents.heuristics.diversity import CDPruner, max_min_diversity
from agents.heuristics.replacing import Replacer, VisionZip, downsampled_image
from grip_env.vlms.base import Encoded, FrozenVLM

__all__ = ["BASELINES", "METHODS", "Method", "Need", "method", "methods_table"]

Need = Literal["CLS attention", "received attention", "question", "ground truth", "new tokens", "smaller images"]
"""What a method may take: attention of the vision tower, words of a question, labels, a model that can be given tokens
of other features, or one whose number of tokens follows the size of the image."""


@dataclass(frozen=True)
class Method:
    """A training-free way to get along with fewer tokens."""

    title: str
    """Its name in tables."""
    run: Selector | Replacer
    """A selector of tokens, or a replacer where the tokens themselves change."""
    source: str
    """Where it comes from; empty for what is common knowledge."""
    needs: tuple[Need, ...] = ()
    note: str = ""
    """Where it departs from its source, or what to keep in mind."""

    @property
    def replaces(self) -> bool:
        """Whether ``run`` returns a :class:`~agents.heuristics.replacing.Replacement` instead of a selection."""
        return {"new tokens", "smaller images"} & set(self.needs) != set()

    def refusal(self, vlm: FrozenVLM, encoded: Encoded) -> str | None:
        """Return why the method cannot run on these examples, or ``None`` if it can.

        Args:
            vlm: The model.
            encoded: Examples of what is to be compared on; the first is tried.
        """
        import torch

        first = encoded[:1]
        if "question" in self.needs and not bool(first.question_mask.any()):
            return f"{self.title} needs a question, and there is none"
        if "ground truth" in self.needs and first.relevance() is None:
            return f"{self.title} needs the ground truth, which these examples do not have"
        if not {"CLS attention", "received attention", "new tokens", "smaller images"} & set(self.needs):
            return None
        one = torch.ones(1, dtype=torch.long, device=first.token_mask.device)
        try:
            self.run(vlm, first, one, torch.Generator().manual_seed(0))
        except NotImplementedError as error:
            return f"{self.title} needs {' and '.join(self.needs)}: {error}"
        return None


FASTERVLM = 'Zhang et al., "[CLS] attention is all you need for training-free visual token pruning", 2024'
VISIONZIP = 'Yang et al., "VisionZip: longer is better but not necessary in vision language models", CVPR 2025'

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
        "half by attention, half by diversity, of projected tokens",
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
    "oracle": Method("oracle", oracle, "", ("ground truth",), "uses the ground truth"),
}
"""By the name on the command line."""

BASELINES: dict[str, Selector] = {
    "random": random_tokens,
    "uniform grid": uniform_grid,
    "CLS attention": cls_attention,
    "max-min diversity": max_min_diversity,
    "oracle": oracle,
}
"""What every report compares with unless it is told otherwise, by the name in its tables."""


def method(name: str) -> Method:
    """Return a method by its name on the command line.

    Raises:
        ValueError: If there is none of this name.
    """
    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}: choose from {', '.join(METHODS)}")
    return METHODS[name]


def methods_table(names: Sequence[str] = tuple(METHODS)) -> str:
    """Return a Markdown table of methods: name on the command line and in tables, needs, source and notes."""
    lines = ["| name | in tables | needs | source and notes |", "|---|---|---|---|"]
    for name in names:
        one = method(name)
        notes = "; ".join(part for part in (one.source, one.note) if part)
        lines.append(f"| `{name}` | {one.title} | {', '.join(one.needs)} | {notes} |")
    return "\n".join(lines)
