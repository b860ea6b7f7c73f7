"""What training costs is counted once, in one place, and agrees with what a model was asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from agents.grpo import GRPO, GRPOConfig
from agents.pool import ExamplePool, ForwardCounter
from agents.scorer import Scorer, ScorerConfig
from agents.training.imitation import Imitation
from agents.training.options import ImitationConfig
from grip_env.vlms.base import Encoded, Scores
from tests.fakes import WIDTH, FakeTask, FakeVLM


class Ledger(FakeVLM):
    """Keeps its own account: 1 for each selection read, 3 where a gradient with respect to the tokens was wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.spent = 0
        self.inside = False

    def score(self, encoded: Encoded, selection: torch.Tensor, *args: Any, **kwargs: Any) -> Scores:
        self.spent += selection.shape[0] * selection.shape[1]
        self.inside = True
        scores = super().score(encoded, selection, *args, **kwargs)
        self.inside = False
        return scores

    def log_likelihood(self, encoded: Encoded, selection: torch.Tensor, tokens: Any = None) -> torch.Tensor:
        if not self.inside:
            backward = tokens is not None and tokens.requires_grad
            self.spent += selection.shape[0] * selection.shape[1] * (3 if backward else 1)
        seen = encoded.tokens if tokens is None else tokens
        return super().log_likelihood(encoded, selection) + (selection[..., None] * seen[:, None]).sum((2, 3)) / 100


def scorer() -> Scorer:
    torch.manual_seed(0)
    return Scorer(ScorerConfig(token_width=WIDTH, width=32, blocks=1, heads=2))


@pytest.mark.parametrize("teacher", ["gradient", "attention", "relevance", "leave_one_out"])
@pytest.mark.parametrize("reward", ["log_likelihood", "agreement"])
def test_grpo_reports_at_every_step_what_the_model_has_read_so_far(teacher: Any, reward: str) -> None:
    vlm = Ledger()
    options: dict[str, Any] = {
        "steps": 4,
        "warmup_steps": 4,
        "instances": 6,
        "candidates": 1,
        "group": 3,
        "pool": 9,
        "reuse": 2,
    }
    pool = ExamplePool(vlm, FakeTask(40), size=9, reuse=2)
    algorithm = GRPO(vlm, pool, scorer(), GRPOConfig(teacher=teacher, epochs=2, **options), reward)
    before = 0
    for metrics in algorithm.train():
        assert metrics.values["forwards"] == pool.compute.forwards == vlm.spent >= before
        assert metrics.values["seconds"] > 0
        before = vlm.spent
    assert before > 9 + 4 * 6 * 3


@pytest.mark.parametrize("teacher", ["gradient", "leave_one_out"])
def test_imitation_reports_the_same_way(teacher: Any) -> None:
    vlm = Ledger()
    pool = ExamplePool(vlm, FakeTask(40), size=9, reuse=2)
    algorithm = Imitation(vlm, pool, scorer(), ImitationConfig(steps=5, instances=6, pool=9, teacher=teacher))
    for metrics in algorithm.train():
        assert metrics.values["forwards"] == vlm.spent
        assert metrics.values["seconds"] > 0


def test_account_by_hand() -> None:
    """9 examples enter the pool; 2 steps of 6 gradients; 2 steps of 6 x 3 subsets, 6 new examples before the first."""
    vlm = Ledger()
    pool = ExamplePool(vlm, FakeTask(40), size=9, reuse=2)
    config = GRPOConfig(steps=2, warmup_steps=2, instances=6, candidates=1, group=3, pool=9, reuse=2)
    spent = [m.values["forwards"] for m in GRPO(vlm, pool, scorer(), config).train()]
    assert spent == [9 + 18, 9 + 36, 9 + 36 + 6 + 18, 9 + 36 + 6 + 36]


def test_first_tokens_asked_for_later_are_paid_for() -> None:
    vlm = Ledger()
    pool = ExamplePool(vlm, FakeTask(40), size=9)
    pool.batch(4)
    pool.batch(4, first_token=True)
    assert pool.compute.forwards == vlm.spent == 18


def test_counting_backwards_is_refused() -> None:
    compute = ForwardCounter()
    with pytest.raises(ValueError, match="at least 0; got -1"):
        compute.add(-1)
    assert compute.forwards == 0
