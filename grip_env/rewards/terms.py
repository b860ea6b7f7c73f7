"""Rewards of selections: callables that compare scores with those of the full image.

A reward is any callable ``reward(scores, full) -> tensor (B, G)``; pass one to an environment as ``reward=...``. The
ones below can be added to each other, to user-defined callables and to numbers:

>>> from grip_env.rewards.parsing import resolve_reward
>>> reward = 2 * AnswerLogLikelihood() - 0.1 * KeptFraction()
>>> reward
2 * AnswerLogLikelihood() - 0.1 * KeptFraction()
>>> reward == resolve_reward("2 * log_likelihood - kept_fraction / 10")
True
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

    from grip_env.vlms.base import Scores


__all__ = [
    "REWARDS",
    "AgreementWithFull",
    "AnswerLogLikelihood",
    "AnswerProbability",
    "ComposableReward",
    "ExactMatch",
    "KeptFraction",
    "Reward",
    "WeightedSum",
    "check_reward",
    "needs_agreement",
]


@runtime_checkable
class Reward(Protocol):
    """Interface of rewards: callables that turn scores into rewards.

    A reward does not depend on images, budgets or episodes otherwise. If it reads ``scores.agreement``, it has an
    attribute ``needs_agreement`` that is True, so that agreement is computed.
    """

    def __call__(self, scores: Scores, full: Scores) -> torch.Tensor:
        """Return the reward of each selection.

        Args:
            scores: Scores of G selections of B examples, fields of shape (B, G).
            full: Scores of the same examples with every token kept, fields of shape (B, 1).

        Returns:
            float (B, G), finite.
        """
        ...


def needs_agreement(reward: Reward) -> bool:
    """Return whether ``reward`` declares that it reads ``scores.agreement``; False by default."""
    return bool(getattr(reward, "needs_agreement", False))


class ComposableReward(ABC):
    """Base class of rewards that support arithmetic.

    ``+`` and ``-`` take rewards, plain callables ``reward(scores, full)`` and numbers; ``*`` and ``/`` take a number.
    Anything else raises TypeError: write a callable for it. The result is a :class:`WeightedSum`.
    """

    __array_ufunc__ = None  # so that NumPy numbers defer to the operators below

    @abstractmethod
    def __call__(self, scores: Scores, full: Scores) -> torch.Tensor:
        """Return the reward of each selection; see :class:`Reward`."""

    @property
    def needs_agreement(self) -> bool:
        """True if the reward reads ``scores.agreement``."""
        return False

    def __add__(self, other: Reward | float) -> ComposableReward:
        return _combine(_parts(self), _parts(other))

    def __radd__(self, other: Reward | float) -> ComposableReward:
        return _combine(_parts(other), _parts(self))

    def __sub__(self, other: Reward | float) -> ComposableReward:
        return _combine(_parts(self), _parts(other, -1.0))

    def __rsub__(self, other: Reward | float) -> ComposableReward:
        return _combine(_parts(other), _parts(self, -1.0))

    def __mul__(self, number: float) -> ComposableReward:
        return _combine(_parts(self, _number(number, "multiplied")))

    __rmul__ = __mul__

    def __truediv__(self, number: float) -> ComposableReward:
        return _combine(_parts(self, 1 / _number(number, "divided")))

    def __neg__(self) -> ComposableReward:
        return _combine(_parts(self, -1.0))


@dataclass(frozen=True, eq=False, repr=False)
class WeightedSum(ComposableReward):
    """Weighted sum of rewards and a constant, the result of arithmetic with rewards.

    Sums are equal if they have the same terms, in any order, and the same constant. To weight a single plain callable,
    write ``WeightedSum(((0.5, my_callable),))``.

    Args:
        terms: Weight and reward of each term.
        constant: Number added to the sum of the terms.

    Raises:
        TypeError: If a term is not a reward.
        ValueError: If there is no term, or a number is not finite.
    """

    terms: tuple[tuple[float, Reward], ...]
    constant: float = 0.0

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("a sum of rewards has at least one term; got none")
        for _, reward in self.terms:
            check_reward(reward)
        numbers = [self.constant, *(weight for weight, _ in self.terms)]
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError(f"numbers in a sum of rewards must be finite; got {numbers}")

    @property
    def needs_agreement(self) -> bool:
        """True if any term reads ``scores.agreement``."""
        return any(needs_agreement(reward) for _, reward in self.terms)

    def __call__(self, scores: Scores, full: Scores) -> torch.Tensor:
        """Return the weighted sum, (B, G)."""
        total: Any = self.constant
        for weight, reward in self.terms:
            total = total + weight * reward(scores, full)
        return total

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WeightedSum):
            return NotImplemented
        return (
            self.constant == other.constant
            and len(self.terms) == len(other.terms)
            and all(self.terms.count(term) == other.terms.count(term) for term in self.terms)
        )

    def __hash__(self) -> int:
        return hash((self.constant, frozenset(self.terms)))

    def __repr__(self) -> str:
        parts = [(weight, _name(reward)) for weight, reward in self.terms]
        parts += [(self.constant, "")] if self.constant else []
        text = ""
        for weight, name in parts:
            size = repr(abs(weight)).removesuffix(".0")
            shown = name if name and abs(weight) == 1 else f"{size} * {name}" if name else size
            sign = "-" if weight < 0 else "+"
            text += f" {sign} {shown}" if text else f"-{shown}" if weight < 0 else shown
        return text


@dataclass(frozen=True)
class AnswerLogLikelihood(ComposableReward):
    """Mean answer log-likelihood minus the same with all tokens kept, in nats per token.

    0 means that nothing was lost; above 0, the answer is more likely than with the full image.
    """

    def __call__(self, scores: Scores, full: Scores) -> torch.Tensor:
        """Return the difference, (B, G)."""
        return scores.log_likelihood - full.log_likelihood


@dataclass(frozen=True)
class AnswerProbability(ComposableReward):
    """Geometric mean of the answer tokens' probabilities, in [0, 1].

    This is exp of the mean log-likelihood; for a one-token answer, its probability. The full image is not used, so
    rewards are low for an example that the model cannot answer, whatever is kept.
    """

    def __call__(self, scores: Scores, full: Scores) -> torch.Tensor:
        """Return the probability, (B, G)."""
        return scores.log_likelihood.exp()


@dataclass(frozen=True)
class ExactMatch(ComposableReward):
    """1 if greedy decoding gives the answer, 0 otherwise."""

    def __call__(self, scores: Scores, full: Scores) -> torch.Tensor:
        """Return 0 or 1, (B, G)."""
        return scores.correct.to(scores.log_likelihood.dtype)


@dataclass(frozen=True)
class AgreementWithFull(ComposableReward):
    """Negative KL divergence, in nats, from the full-image model's first-token distribution.

    The reward is -KL(full || selection), where both are the model's distributions over the first answer token. 0 means
    that the model predicts the same as with all tokens kept, right or wrong; otherwise the reward is negative.

    No labels are needed: the reward does not use the answer text, only the model's prediction at the end of the prompt.
    (Examples still have an answer, for the log-likelihood and accuracy in logs. If a tokenizer merges the end of the
    prompt and the beginning of an answer into one token, the distribution is the one before that token.) If first
    tokens carry little information, as when every answer begins with "the", neither does this reward.

    It requires the full image's distribution, V float32 numbers for each example in memory, where V is the size of the
    vocabulary; see :meth:`grip_env.FrozenVLM.score`.
    """

    @property
    def needs_agreement(self) -> bool:
        """True, as the reward reads ``scores.agreement``."""
        return True

    def __call__(self, scores: Scores, full: Scores) -> torch.Tensor:
        """Return the negative divergence, float32 (B, G).

        Raises:
            ValueError: If agreement was not computed.
        """
        if scores.agreement is None:
            raise ValueError(
                "these scores have no agreement with the full image: compute them by vlm.score(encoded, selection, "
                "reference=full.first_token), with full = vlm.score(encoded, encoded.full_selection(), "
                "first_token=True); a callable that uses this reward must set needs_agreement = True"
            )
        return scores.agreement


@dataclass(frozen=True)
class KeptFraction(ComposableReward):
    """Share of the real visual tokens that are kept, in [0, 1].

    With a negative weight it is a cost per token, which matters if actions decide how many tokens to keep. If all
    compared selections keep equally many, as in a group of GRPO, it is constant.
    """

    def __call__(self, scores: Scores, full: Scores) -> torch.Tensor:
        """Return the share, (B, G)."""
        return scores.kept


REWARDS: dict[str, type[ComposableReward]] = {
    "log_likelihood": AnswerLogLikelihood,
    "probability": AnswerProbability,
    "exact_match": ExactMatch,
    "agreement": AgreementWithFull,
    "kept_fraction": KeptFraction,
}
"""Reward classes by name; names are accepted wherever a reward is expected."""


def check_reward(reward: object) -> Reward:
    """Return ``reward`` if it is a callable object; otherwise raise TypeError."""
    if isinstance(reward, type) or not callable(reward):
        raise TypeError(
            f"expected a reward, an object called as reward(scores, full) such as AnswerLogLikelihood(); got {reward!r}"
        )
    return reward


_Parts = tuple[tuple[tuple[float, Any], ...], float]  # terms and constant of a WeightedSum


def _parts(operand: object, factor: float = 1.0) -> _Parts:
    """Return the terms and constant of ``factor`` times an operand of ``+`` or ``-``."""
    if isinstance(operand, Real):
        return (), factor * float(operand)
    if isinstance(operand, WeightedSum):
        return tuple((factor * weight, reward) for weight, reward in operand.terms), factor * operand.constant
    return ((factor, check_reward(operand)),), 0.0


def _combine(*parts: _Parts) -> ComposableReward:
    """Return the sum of all parts, or the reward itself if it is a single unweighted term."""
    terms = tuple(term for terms, _ in parts for term in terms)
    constant = sum(number for _, number in parts)
    if not constant and len(terms) == 1 and terms[0][0] == 1 and isinstance(terms[0][1], ComposableReward):
        return terms[0][1]
    return WeightedSum(terms, constant)


def _number(number: object, done: str) -> float:
    if not isinstance(number, Real):
        raise TypeError(
            f"a reward can be {done} by a number, and not by {number!r}: for anything else write a callable "
            "reward(scores, full)"
        )
    return float(number)


def _name(reward: Reward) -> str:
    """Return the text of a term; the name for functions, whose repr shows an address."""
    if isinstance(reward, WeightedSum):
        return f"({reward!r})"
    return getattr(reward, "__name__", None) or repr(reward)
