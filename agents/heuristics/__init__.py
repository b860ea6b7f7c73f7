"""Training-free ways to choose tokens before the language model: what every learnt agent stands beside.

Selectors are batched, take any budget, keep exactly as many real tokens as they are asked for (but ``all_tokens``) and
never padding. Replacers, which change what tokens say, use no more. No published code says how it breaks ties; here, of
equal scores the one with the lower index wins.
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
"""What every report compares with unless it is told otherwise, by the name in its tables."""
