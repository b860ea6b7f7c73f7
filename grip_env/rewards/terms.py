"""What a selection is worth: small objects that compare its scores with those of the full image.

A reward is any callable ``reward(scores, full) -> tensor (B, G)``; pass one to an environment as ``reward=...``. Those
below join in sums with each other, with callables of your own and with numbers:

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
    """Turns scores into rewards; knows nothing of images, budgets or episodes.

    One that reads ``scores.agreement`` has an attribute ``needs_agreement`` that is True; whoever scores looks for it.
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
    """Return whether ``reward`` says that it reads ``scores.agreement``; what says nothing does not."""
    return bool(getattr(reward, "needs_agreement", False))


class ComposableReward(ABC):
    """A reward with arithmetic: derive from it to give your own the same.

    ``+`` and ``-`` take rewards, plain callables ``reward(scores, full)`` and numbers; ``*`` and ``/`` take a number.
    Anything else is a TypeError: write a callable for it. What comes out is a :class:`WeightedSum`.
    """

    __array_ufunc__ = None  # so that NumPy's numbers leave the operators below to us

    @abstractmethod
    def __call__(self, scores: Scores, full: Scores) -> torch.Tensor:
        """Return the reward of each selection; see :class:`Reward`."""

    @property
    def needs_agreement(self) -> bool:
        """Whether the reward reads ``scores.agreement``."""
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
    """A sum of weighted rewards and a constant, in the units of its terms: what arithmetic with rewards makes.

    Two are equal that have the same terms and constant, in any order. To weigh a plain callable by itself, write
    ``WeightedSum(((0.5, my_callable),))``.

    Args:
        terms: Weight and reward of each term.
        constant: Added to their sum.

    Raises:
        TypeError: If a term is no reward.
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
        """Whether any term reads ``scores.agreement``."""
        return any(needs_agreement(reward) for _, reward in self.terms)

    def __call__(self, scores: Scores, full: Scores) -> torch.Tensor:
        """Return the sum, (B, G)."""
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
    """Mean answer log-likelihood under the selection minus the same with all tokens kept, in nats per token.

    0 means that nothing was lost, above 0 that the answer became likelier than with the whole image.
    """

    def __call__(self, scores: Scores, full: Scores) -> torch.Tensor:
        """Return the difference, (B, G)."""
        return scores.log_likelihood - full.log_likelihood


@dataclass(frozen=True)
class AnswerProbability(ComposableReward):
    """Geometric mean of the answer tokens' probabilities, in [0, 1]: exp of the mean log-likelihood.

    For an answer of one token this is its probability. The full image plays no part, so an example that the
    model cannot answer pays little whatever is kept.
    """

    def __call__(self, scores: Scores, full: Scores) -> torch.Tensor:
        """Return the probability, (B, G)."""
        return scores.log_likelihood.exp()


@dataclass(frozen=True)
class ExactMatch(ComposableReward):
    """1 where greedy decoding gives the answer, 0 elsewhere."""

    def __call__(self, scores: Scores, full: Scores) -> torch.Tensor:
        """Return 0 or 1, (B, G)."""
        return scores.correct.to(scores.log_likelihood.dtype)


@dataclass(frozen=True)
class AgreementWithFull(ComposableReward):
    """Minus the KL divergence, in nats, from the unpruned model's distribution over the first answer token to that
    under the selection: -KL(full || selection).

    0 means that the model is of the same mind as with all tokens kept, whether or not it is right; below 0 otherwise.
    It needs no labels: no answer text enters it, only what the model expects where its prompt ends. (Examples have an
    answer all the same, which log-likelihood and accuracy in logs are about. Should a tokenizer join the end of the
    prompt and the beginning of an answer into one token, then the place is the one before that token.) Where first
    tokens tell little, as when every answer begins with "the", so does this reward.

    Needs the full image's distribution, V float32 numbers for each example in memory, with V the size of the
    vocabulary; see :meth:`grip_env.FrozenVLM.score`.
    """

    @property
    def needs_agreement(self) -> bool:
        """Whether the reward reads ``scores.agreement``: it does."""
        return True

    def __call__(self, scores: Scores, full: Scores) -> torch.Tensor:
        """Return the negative divergence, float32 (B, G).

        Raises:
            ValueError: If it was not computed.
        """
        if scores.agreement is None:
            raise ValueError(
                "these scores have no agreement with the full image: get them by vlm.score(encoded, selection, "
                "reference=full.first_token), with full = vlm.score(encoded, encoded.full_selection(), "
                "first_token=True); a callable that uses this reward says so by needs_agreement = True"
            )
        return scores.agreement


@dataclass(frozen=True)
class KeptFraction(ComposableReward):
    """Share of the real visual tokens kept, in [0, 1]; with a negative weight, the price of a token.

    It matters where an action decides how many tokens to keep. Where all that are compared keep equally many, as in a
    group of GRPO, it is a constant.
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
"""Names that stand for a reward wherever one is expected."""


def check_reward(reward: object) -> Reward:
    """Return ``reward`` if it is an object to call, or raise TypeError."""
    if isinstance(reward, type) or not callable(reward):
        raise TypeError(
            f"expected a reward, an object called as reward(scores, full) such as AnswerLogLikelihood(); got {reward!r}"
        )
    return reward


_Parts = tuple[tuple[tuple[float, Any], ...], float]  # terms and constant of a WeightedSum


def _parts(operand: object, factor: float = 1.0) -> _Parts:
    """Return what ``factor`` times an operand of ``+`` or ``-`` is the sum of."""
    if isinstance(operand, Real):
        return (), factor * float(operand)
    if isinstance(operand, WeightedSum):
        return tuple((factor * weight, reward) for weight, reward in operand.terms), factor * operand.constant
    return ((factor, check_reward(operand)),), 0.0


def _combine(*parts: _Parts) -> ComposableReward:
    """Return the sum of all parts: the reward itself where a single one is left, unweighted."""
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
    """Return how a term is shown; functions by their name, for their repr is an address."""
    if isinstance(reward, WeightedSum):
        return f"({reward!r})"
    return getattr(reward, "__name__", None) or repr(reward)
