"""The learned baseline predicts rewards, and the agents that need no group learn from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from agents.grpo import RLOO, Reinforce
from agents.learning import Learner, draw_counts
from agents.pool import ExamplePool
from agents.scorer import Scorer, ScorerConfig
from agents.training.grpo_config import ReinforceConfig, RLOOConfig
from agents.training.value_baseline import ValueBaseline
from grip_env.vlms.base import Encoded
from tests.fakes import WIDTH, FakeTask, FakeVLM

SMALL = ScorerConfig(token_width=WIDTH, width=32, blocks=2, heads=2)


def batch(count: int = 30) -> Encoded:
    return FakeVLM().encode([FakeTask(40).example("train", index) for index in range(count)])


def test_learns_what_a_budget_is_worth() -> None:
    """Random subsets earn in proportion to their size: what is predicted follows it, for examples never seen too."""
    vlm, generator = FakeVLM(), torch.Generator().manual_seed(0)
    value, encoded = ValueBaseline(SMALL, 3e-3, 1.0, decay_over=100), batch()
    losses = []
    for step in range(100):
        kept = draw_counts(encoded, 0.06, 0.9, generator)
        subsets = torch.rand(30, 4, 16, generator=generator).argsort(-1) < kept[:, None, None]
        losses.append(value.learn(encoded, kept, vlm.score(encoded, subsets).log_likelihood, step))
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])
    fresh = vlm.encode([FakeTask(40).example("test", index) for index in range(20)])
    for kept in (2, 8, 14):
        expected = -2 + 1.9 * kept / 16  # each relevant token is kept with probability k / N
        found = float(value.predict(fresh, torch.full((20,), kept)).mean())
        assert found == pytest.approx(expected, abs=0.15)


def test_prediction_is_made_before_the_subsets_are_learnt_from(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    predict, learn, minimise = ValueBaseline.predict, ValueBaseline.learn, Learner.minimise
    monkeypatch.setattr(ValueBaseline, "predict", lambda *a: (order.append("predict"), predict(*a))[1])
    monkeypatch.setattr(ValueBaseline, "learn", lambda *a: (order.append("learn"), learn(*a))[1])
    monkeypatch.setattr(Learner, "minimise", lambda *a: (order.append("step"), minimise(*a))[1])
    for _ in build(Reinforce, ReinforceConfig, steps=2, warmup_steps=0).train():
        pass
    assert order == ["predict", "step", "learn", "step"] * 2


def test_padding_changes_no_prediction() -> None:
    task = FakeTask(40)
    vlm = FakeVLM(count=lambda example: 16 if example.key.endswith("0") else 12)
    encoded = vlm.encode([task.example("train", 0), task.example("train", 1)])
    value = ValueBaseline(SMALL, 1e-3, 1.0, 10)
    torch.nn.init.normal_(value.network.out[1].weight)  # type: ignore[arg-type]
    alone = vlm.encode([task.example("train", 1)])
    kept = torch.tensor([4, 4])
    torch.testing.assert_close(value.predict(encoded, kept)[1:], value.predict(alone, kept[1:]))
    assert value.predict(encoded, kept)[0] != value.predict(encoded, kept)[1]


def test_weights_follow_from_the_seed_and_leave_other_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    one, other, third = (ValueBaseline(SMALL, 1e-3, 1.0, 10, seed).network.state_dict() for seed in (0, 0, 1))
    assert torch.rand(4).equal(expected)
    assert all(value.equal(other[name]) for name, value in one.items())
    assert not all(value.equal(third[name]) for name, value in one.items())


def build(kind: Any, config: Any, **changes: Any) -> Any:
    options: dict[str, Any] = {"steps": 3, "instances": 8, "group": 2, "pool": 16, "min_budget": 0.06}
    settings = config(**(options | {"teacher": "relevance"} | changes))
    vlm = FakeVLM()
    torch.manual_seed(0)
    return kind(vlm, ExamplePool(vlm, FakeTask(40), size=settings.pool), Scorer(SMALL), settings)


@pytest.mark.parametrize(("kind", "config", "group"), [(RLOO, RLOOConfig, 4), (Reinforce, ReinforceConfig, 2)])
def test_relatives_learn_which_tokens_pay(kind: Any, config: Any, group: int) -> None:
    options: dict[str, Any] = {"warmup_steps": 0, "instances": 32, "pool": 40, "learning_rate": 5e-3}
    metrics = list(build(kind, config, steps=80, group=group, **options).train())
    start, end = (sum(m.values["reward"] for m in part) / 10 for part in (metrics[:10], metrics[-10:]))
    assert end > start + 0.3
