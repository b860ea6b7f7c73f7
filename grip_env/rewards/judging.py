"""Rewards of the scores that a model gave, checked to be finite numbers of the right shape."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from grip_env.rewards.terms import Reward

if TYPE_CHECKING:
    import torch

    from grip_env.vlms.base import Scores


__all__ = ["judge"]


def judge(reward: Reward, scores: Scores, full: Scores, finite: bool = True) -> torch.Tensor:
    """Return the reward of each selection, (B, G), after checking that it is one.

    Args:
        reward: What is asked.
        scores: Of the selections.
        full: With all tokens kept.
        finite: False lets NaN and infinities through.

    The reward gets copies (but of ``first_token``, which is large): one that works in place spoils nothing.

    Raises:
        ValueError: If it is no numbers, or not finite (NonFiniteError), or of another shape: (B, 1), for one, would
            teach nothing and not fail.
    """
    import torch

    given = reward(_own(scores), _own(full))
    try:
        worth = torch.as_tensor(given).detach()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"the reward {reward!r} gave {given!r}, expected a tensor of numbers") from None
    if worth.shape != scores.log_likelihood.shape:
        raise ValueError(
            f"the reward {reward!r} gave shape {tuple(worth.shape)}, expected {tuple(scores.log_likelihood.shape)}: "
            "one number for each selection of each example"
        )
    if finite and not bool(torch.isfinite(worth).all()):
        from grip_env.common.finite import NonFiniteError

        bad = int((~torch.isfinite(worth)).sum())
        raise NonFiniteError(f"the reward {reward!r} is not finite for {bad} of {worth.numel()} selections: check it")
    return worth


def _own(scores: Scores) -> Scores:
    """Return the same scores with fields of their own, but for the first tokens' distributions."""
    fields = {
        name: value.clone() for name, value in vars(scores).items() if value is not None and name != "first_token"
    }
    return replace(scores, **fields)
