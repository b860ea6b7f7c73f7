"""From selections to rewards: ask the frozen model, and judge what it says."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from grip_env.rewards.terms import Reward, needs_agreement

if TYPE_CHECKING:
    import torch

    from grip_env.vlms.base import Encoded, FrozenVLM, Scores


__all__ = ["RewardScorer", "full_scores", "judge"]


def full_scores(vlm: FrozenVLM, encoded: Encoded, first_token: bool = False) -> Scores:
    """Return the scores of B examples with every token kept, fields of shape (B, 1).

    Args:
        vlm: The frozen model.
        encoded: The examples.
        first_token: Fill in ``first_token`` of the scores, (B, 1, V), which agreement is measured against.
    """
    return vlm.score(encoded, encoded.full_selection(), first_token=first_token)


@dataclass(frozen=True)
class RewardScorer:
    """A frozen model and the reward of its scores: what environments, searches and trainers ask about selections.

    A reward such as "agreement" compares each selection with the full image, which the model must have read before.
    This class knows what to ask for then; without it every caller has to.
    """

    vlm: FrozenVLM
    reward: Reward

    @property
    def agreement(self) -> bool:
        """Whether the reward compares first tokens' distributions with those of the full image."""
        return needs_agreement(self.reward)

    def full(self, encoded: Encoded) -> Scores:
        """Return the scores of B examples with every token kept, (B, 1): what :meth:`score` and :meth:`judge` take."""
        return full_scores(self.vlm, encoded, self.agreement)

    def score(self, encoded: Encoded, selections: torch.Tensor, full: Scores | None = None) -> Scores:
        """Return the scores of selections, bool (B, G, N), fields of shape (B, G).

        Args:
            encoded: B examples.
            selections: What the model sees of them.
            full: Their scores with every token kept; ``None`` where the selections are of every token themselves, so
                that what others will be compared with is asked for.
        """
        return self.vlm.score(
            encoded,
            selections,
            first_token=self.agreement and full is None,
            reference=None if full is None else full.first_token,
        )

    def judge(self, scores: Scores, full: Scores, finite: bool = True) -> torch.Tensor:
        """Return the reward of each selection, (B, G); see :func:`judge`."""
        return judge(self.reward, scores, full, finite)


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
