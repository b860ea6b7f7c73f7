"""The algorithms that train a scorer, by the names that ``python -m grip_env.train --algo`` knows."""

from __future__ import annotations

from agents.agent import ScorerAgent, register
from agents.grpo import GRPO, GRPOConfig

__all__ = ["GRPOAgent"]


@register("grpo")
class GRPOAgent(ScorerAgent):
    """A scorer trained by :class:`~agents.grpo.GRPO`."""

    Options, Algorithm = GRPOConfig, GRPO
