"""Trained scorers as selectors and policies."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from agents.scorer import Scorer, ScorerInputs
from grip_env.envs.core.sampling import tokens_in_budget
from grip_env.vlms.base import Encoded, FrozenVLM

__all__ = ["ScorerPolicy", "ScorerSelector"]

MOST_PAIRS = 2**24
"""Most token pairs per call if tokens are chosen one after another: 64 MiB for each float32 value of a pair."""


class ScorerSelector:
    """Selector that keeps the mode of a scorer's policy.

    Args:
        scorer: The trained network.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    @torch.no_grad()
    def __call__(
        self, vlm: FrozenVLM, encoded: Encoded, counts: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Choose tokens; see :class:`agents.base.Selector`."""
        rows = len(encoded)
        if self.scorer.config.in_turn:
            rows = max(1, MOST_PAIRS // encoded.token_mask.shape[1] ** 2)
        parts = [slice(start, start + rows) for start in range(0, len(encoded), rows)]
        return torch.cat([self.scorer.policy(encoded[part], counts[part]).mode for part in parts])


class ScorerPolicy:
    """Policy that keeps the mode of a scorer's policy for one observation.

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
        k = tokens_in_budget(float(budget), int(mask.sum()))
        inputs = ScorerInputs(
            row("tokens"), row("positions"), mask, row("question"), row("question_mask").bool(), budget
        )
        return self.scorer.decide(inputs, torch.tensor([k], device=device)).mode[0].cpu().numpy()
