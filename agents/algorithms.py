"""The algorithms that train a scorer, by the names that ``python -m grip_env.train --algo`` knows."""

from __future__ import annotations

from agents.agent import ScorerAgent, register
from agents.grpo import GRPO, RLOO, GRPOConfig, Reinforce
from agents.training.grpo_config import ReinforceConfig, RLOOConfig
from agents.training.imitation import Imitation, ImitationConfig
from agents.training.relaxations import (
    GumbelTopK,
    GumbelTopKConfig,
    SigmoidGates,
    SigmoidGatesConfig,
    SoftTopK,
    SoftTopKConfig,
)

__all__ = [
    "GRPOAgent",
    "GumbelTopKAgent",
    "ImitationAgent",
    "RLOOAgent",
    "ReinforceAgent",
    "SigmoidGatesAgent",
    "SoftTopKAgent",
]


@register("grpo")
class GRPOAgent(ScorerAgent):
    """A scorer trained by :class:`~agents.grpo.GRPO`."""

    Options, Algorithm = GRPOConfig, GRPO


@register("rloo")
class RLOOAgent(ScorerAgent):
    """A scorer trained by :class:`~agents.grpo.RLOO`."""

    Options, Algorithm = RLOOConfig, RLOO


@register("reinforce")
class ReinforceAgent(ScorerAgent):
    """A scorer trained by :class:`~agents.grpo.Reinforce`."""

    Options, Algorithm = ReinforceConfig, Reinforce


@register("imitation")
class ImitationAgent(ScorerAgent):
    """A scorer trained by :class:`~agents.training.imitation.Imitation`."""

    Options, Algorithm = ImitationConfig, Imitation


@register("gumbel-top-k")
class GumbelTopKAgent(ScorerAgent):
    """A scorer trained by :class:`~agents.training.relaxations.GumbelTopK`."""

    Options, Algorithm = GumbelTopKConfig, GumbelTopK


@register("sigmoid-gates")
class SigmoidGatesAgent(ScorerAgent):
    """A scorer trained by :class:`~agents.training.relaxations.SigmoidGates`."""

    Options, Algorithm = SigmoidGatesConfig, SigmoidGates


@register("soft-top-k")
class SoftTopKAgent(ScorerAgent):
    """A scorer trained by :class:`~agents.training.relaxations.SoftTopK`."""

    Options, Algorithm = SoftTopKConfig, SoftTopK
