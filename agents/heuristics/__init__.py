"""Training-free ways to choose tokens before the language model: what every learnt agent stands beside.

Selectors are batched, take any budget, keep exactly as many real tokens as they are asked for (but ``all_tokens``) and
never padding. Replacers, which change what tokens say, use no more. No published code says how it breaks ties; here, of
equal scores the one with the lower index wins.
"""

from agents.heuristics.attention import VisPruner, cls_attention, received_attention
from agents.heuristics.basic import all_tokens, feature_norm, oracle, random_tokens, uniform_grid
from agents.heuristics.diversity import CDPruner, max_min_diversity
from agents.heuristics.registry import BASELINES, METHODS, Method, method, methods_table
from agents.heuristics.replacing import Replacement, Replacer, VisionZip, downsampled_image

__all__ = [
    "BASELINES",
    "METHODS",
    "CDPruner",
    "Method",
    "Replacement",
    "Replacer",
    "VisPruner",
    "VisionZip",
    "all_tokens",
    "cls_attention",
    "downsampled_image",
    "feature_norm",
    "max_min_diversity",
    "method",
    "methods_table",
    "oracle",
    "random_tokens",
    "received_attention",
    "uniform_grid",
]
