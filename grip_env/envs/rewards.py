"""Former location of :mod:`grip_env.rewards.terms`.

Kept because saved configurations and programs may refer to it.
"""

from grip_env.rewards.parsing import resolve_reward
from grip_env.rewards.terms import (
    REWARDS,
    AgreementWithFull,
    AnswerLogLikelihood,
    AnswerProbability,
    ComposableReward,
    ExactMatch,
    KeptFraction,
    Reward,
    WeightedSum,
)

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
    "resolve_reward",
]
