"""Set-wise policy for sb3-contrib's MaskablePPO; its import needs the extra "contrib"."""

from __future__ import annotations

from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy

from agents.sb3.set_policy import SetWise

__all__ = ["MaskableSetPolicy"]


class MaskableSetPolicy(SetWise, MaskableActorCriticPolicy):
    """A set-wise policy for MaskablePPO on the token-by-token environment.

    Observations tell it which tokens are real and not selected yet, so ``predict`` makes legal choices with and without
    ``action_masks``.
    """
