"""Trained scorers as selectors and policies."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from agents.scorer import Scorer
from grip_env.envs.sampling import tokens_in_budget
from grip_env.vlms.base import Encoded, FrozenVLM

__all__ = ["ScorerPolicy", "ScorerSelector"]


class ScorerSelector:
    """Keeps the tokens a scorer would: the mode of its policy.

    Args:
        scorer: The trained network.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    @torch.no_grad()
    def __call__(
        self, vlm: FrozenVLM, encoded: Encoded, kept: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Choose tokens; see :class:`agents.base.Selector`."""
        return self.scorer.policy(encoded, kept).mode


class ScorerPolicy:
    """The same on one observation of the environment.

    Args:
        scorer: The trained network.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    @torch.no_grad()
    def select(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return a bool mask over the visual tokens, (N,)."""

        device = next(self.scorer.parameters()).device

        def row(key: str) -> torch.Tensor:
            return torch.as_tensor(observation[key], device=device)[None]

        mask = row("token_mask").bool()
        budget = row("budget")[:, 0]
        kept = tokens_in_budget(float(budget), int(mask.sum()))
        seen = (row("tokens"), row("positions"), mask, row("question"), row("question_mask").bool(), budget)
        return self.scorer.decide(*seen, torch.tensor([kept], device=device)).mode[0].cpu().numpy()
