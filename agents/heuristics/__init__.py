"""Training-free methods that choose tokens before the language model runs.

They are the baselines for every learnt agent. Selectors work on batches, take any budget, keep exactly as many real
tokens as asked for (except ``all_tokens``) and never keep padding. Replacers, which change the tokens themselves, use
no more than asked for. No published code documents how it breaks ties; here the lower index wins among equal scores.
"""

from agents.base import Selector
from agents.heuristics.attention import VisPruner, cls_attention, received_attention
from agents.heuristics.basic import all_tokens, feature_norm, oracle, random_tokens, uniform_grid
from agents.heuristics.diversity import CDPruner, max_min_diversity
from agents.heuristics.replacing import Replacement, Replacer, VisionZip, downsampled_image

__all__ = [
    "BASELINES",
    "CDPruner",
    "Replacement",
    "Replacer",
    "VisPruner",
    "VisionZip",
    "all_tokens",
    "cls_attention",
    "downsampled_image",
    "feature_norm",
    "max_min_diversity",
    "oracle",
    "random_tokens",
    "received_attention",
    "uniform_grid",
]

BASELINES: dict[str, Selector] = {
    "random": random_tokens,
    "uniform grid": uniform_grid,
    "CLS attention": cls_attention,
    "max-min diversity": max_min_diversity,
    "oracle": oracle,
}
"""Baselines that every report includes by default, by their name in its tables."""
