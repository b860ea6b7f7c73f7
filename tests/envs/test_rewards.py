from __future__ import annotations

import math

import pytest
import torch

from grip_env.envs.rewards import REWARDS, AnswerLogLikelihood, ExactMatch, Reward, resolve_reward
from grip_env.vlms.base import Scores


@pytest.fixture
def scores() -> Scores:
    return Scores(torch.tensor([[-0.5, -2.0], [-1.0, -0.1]]), torch.tensor([[True, False], [False, True]]))


@pytest.fixture
def full() -> Scores:
    return Scores(torch.tensor([[-0.5], [-0.25]]), torch.tensor([[True], [True]]))


def test_log_likelihood_is_measured_from_the_full_image(scores: Scores, full: Scores) -> None:
    reward = REWARDS["log_likelihood"]()(scores, full)
    torch.testing.assert_close(reward, torch.tensor([[0.0, -1.5], [-0.75, 0.15]]))


def test_probability_is_that_of_one_answer_token(scores: Scores, full: Scores) -> None:
    reward = REWARDS["probability"]()(scores, full)
    expected = [[math.exp(-0.5), math.exp(-2.0)], [math.exp(-1.0), math.exp(-0.1)]]
    torch.testing.assert_close(reward, torch.tensor(expected))


def test_exact_match_is_one_or_zero(scores: Scores, full: Scores) -> None:
    reward = REWARDS["exact_match"]()(scores, full)
    assert reward.tolist() == [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize("name", REWARDS)
def test_every_registered_reward_keeps_shape_and_is_a_float(name: str, scores: Scores, full: Scores) -> None:
    reward = resolve_reward(name)
    assert isinstance(reward, Reward)
    value = reward(scores, full)
    assert value.shape == (2, 2)
    assert value.is_floating_point()
    assert value.isfinite().all()


def test_rewards_resolve_to_themselves_and_functions_are_rewards(scores: Scores, full: Scores) -> None:
    own = ExactMatch()
    assert resolve_reward(own) is own
    assert resolve_reward("log_likelihood") == AnswerLogLikelihood()

    def twice(scores: Scores, full: Scores) -> torch.Tensor:
        return 2 * scores.log_likelihood

    torch.testing.assert_close(resolve_reward(twice)(scores, full), 2 * scores.log_likelihood)


def test_unknown_rewards_are_refused_with_the_names() -> None:
    with pytest.raises(ValueError, match=r"'kl'.*log_likelihood, probability, exact_match"):
        resolve_reward("kl")
    with pytest.raises(TypeError, match="got 3"):
        resolve_reward(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="ExactMatch"):  # a class that was not instantiated
        resolve_reward(ExactMatch)  # type: ignore[arg-type]
