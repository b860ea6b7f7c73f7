"""What a selection is worth: small objects that compare its scores with those of the full image.

A reward is any callable ``reward(scores, full) -> tensor (B, G)``; pass one to an environment as
``reward=...``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

    from grip_env.vlms.base import Scores

__all__ = ["REWARDS", "AnswerLogLikelihood", "AnswerProbability", "ExactMatch", "Reward", "resolve_reward"]


@runtime_checkable
class Reward(Protocol):
    """Turns scores into rewards; knows nothing of images, budgets or episodes."""

    def __call__(self, scores: Scores, full: Scores) -> torch.Tensor:
        """Return the reward of each selection.

        Args:
            scores: Scores of G selections of B examples, fields of shape (B, G).
            full: Scores of the same examples with every token kept, fields of shape (B, 1).

        Returns:
            float (B, G), finite.
        """
        ...


@dataclass(frozen=True)
class AnswerLogLikelihood:
    """Mean answer log-likelihood under the selection minus the same with all tokens kept, in nats per token.

    0 means that nothing was lost, above 0 that the answer became likelier than with the whole image.
    """

    def __call__(self, scores: Scores, full: Scores) -> torch.Tensor:
        """Return the difference, (B, G)."""
        return scores.log_likelihood - full.log_likelihood


@dataclass(frozen=True)
class AnswerProbability:
    """Geometric mean of the answer tokens' probabilities, in [0, 1]: exp of the mean log-likelihood.

    For an answer of one token this is its probability. The full image plays no part, so an example that the
    model cannot answer pays little whatever is kept.
    """

    def __call__(self, scores: Scores, full: Scores) -> torch.Tensor:
        """Return the probability, (B, G)."""
        return scores.log_likelihood.exp()


@dataclass(frozen=True)
class ExactMatch:
    """1 where greedy decoding gives the answer, 0 elsewhere."""

    def __call__(self, scores: Scores, full: Scores) -> torch.Tensor:
        """Return 0 or 1, (B, G)."""
        return scores.correct.to(scores.log_likelihood.dtype)


REWARDS: dict[str, type[Reward]] = {
    "log_likelihood": AnswerLogLikelihood,
    "probability": AnswerProbability,
    "exact_match": ExactMatch,
}
"""Names that stand for a reward wherever one is expected."""


def resolve_reward(reward: str | Reward) -> Reward:
    """Return the reward a name stands for, or the object itself.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If it is neither a name nor an object to call.
    """
    if isinstance(reward, str):
        if reward not in REWARDS:
            raise ValueError(f"unknown reward {reward!r}: choose one of {', '.join(REWARDS)}, or pass a Reward object")
        return REWARDS[reward]()
    if isinstance(reward, type) or not callable(reward):
        raise TypeError(
            f"reward must be one of {', '.join(map(repr, REWARDS))} or an object called as "
            f"reward(scores, full); got {reward!r}"
        )
    return reward
