"""Computation of rewards of selections from the scores of the frozen model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from grip_env.rewards.terms import Reward, needs_agreement

if TYPE_CHECKING:
    import torch

    from grip_env.tasks.base import Example
    from grip_env.vlms.base import Encoded, FrozenVLM, Scores


__all__ = ["RewardScorer", "full_scores", "judge"]


def full_scores(vlm: FrozenVLM, encoded: Encoded, first_token: bool = False) -> Scores:
    """Return the scores of B examples with every token kept, fields of shape (B, 1).

    Args:
        vlm: The frozen model.
        encoded: The examples.
        first_token: Also return ``first_token`` of the scores, (B, 1, V), the reference for agreement.
    """
    return vlm.score(encoded, encoded.full_selection(), first_token=first_token)


@dataclass(frozen=True)
class RewardScorer:
    """Frozen model and reward, with which environments, searches and trainers judge selections.

    A reward such as "agreement" compares each selection with the full image, which must be scored first. This class
    requests the right scores for the reward, so that callers need not.
    """

    vlm: FrozenVLM
    reward: Reward

    @property
    def agreement(self) -> bool:
        """True if the reward compares first-token distributions with those of the full image."""
        return needs_agreement(self.reward)

    def full(self, encoded: Encoded) -> Scores:
        """Return the scores of B examples with every token kept, fields of shape (B, 1).

        They are the ``full`` of :meth:`score` and :meth:`judge`.
        """
        return full_scores(self.vlm, encoded, self.agreement)

    def score(self, encoded: Encoded, selections: torch.Tensor, full: Scores | None = None) -> Scores:
        """Return the scores of selections, with fields of shape (B, G).

        Args:
            encoded: B examples.
            selections: G selections of each example, bool (B, G, N).
            full: Their scores with every token kept; ``None`` if the selections themselves are of every token, so that
                the reference for later comparisons is computed.
        """
        return self.vlm.score(
            encoded,
            selections,
            first_token=self.agreement and full is None,
            reference=None if full is None else full.first_token,
        )

    def judge(
        self, scores: Scores, full: Scores, finite: bool = True, examples: Sequence[Example] | None = None
    ) -> torch.Tensor:
        """Return the reward of each selection, (B, G); see :func:`judge`."""
        return judge(self.reward, scores, full, finite, examples)


def judge(
    reward: Reward,
    scores: Scores,
    full: Scores,
    finite: bool = True,
    examples: Sequence[Example] | None = None,
) -> torch.Tensor:
    """Return the reward of each selection, (B, G), after checking the reward's output.

    Args:
        reward: The reward.
        scores: Scores of the selections.
        full: Scores with all tokens kept.
        finite: If False, NaN and infinities are allowed.
        examples: The B examples, which errors then name.

    The reward receives copies (except of ``first_token``, which is large), so it may work in place.

    Raises:
        ValueError: If the output is not numeric, not finite (NonFiniteError), or has the wrong shape: (B, 1), for
            example, would not fail but would give every selection the same reward.
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
        from grip_env.common.finite import NonFiniteError, name_of

        bad = ~torch.isfinite(worth)
        named = "" if examples is None else f", of {name_of(examples[int(bad.any(1).nonzero()[0])])} among others"
        raise NonFiniteError(
            f"the reward {reward!r} is not finite for {int(bad.sum())} of {worth.numel()} selections{named}: check the "
            "reward, and the model's precision"
        )
    return worth


def _own(scores: Scores) -> Scores:
    """Return a copy of the scores that shares only ``first_token``."""
    fields = {
        name: value.clone() for name, value in vars(scores).items() if value is not None and name != "first_token"
    }
    return replace(scores, **fields)
