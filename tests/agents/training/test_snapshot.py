"""A training that is resumed at any step ends as one in a single piece, bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import agents.training.relaxations as relaxed
from agents.grpo import GRPO, GRPOConfig, Reinforce
from agents.learning import Metrics
from agents.pool import ExamplePool
from agents.scorer import Scorer, ScorerConfig
from agents.training.grpo_config import ReinforceConfig
from agents.training.imitation import Imitation
from agents.training.options import GumbelTopKConfig, ImitationConfig, SigmoidGatesConfig, SoftTopKConfig
from agents.training.relaxations import GumbelTopK, SigmoidGates, SoftTopK
from agents.training.snapshot import Snapshot
from tests.agents.training.test_relaxations import fake_likelihood
from tests.fakes import WIDTH, FakeTask, FakeVLM

SMALL: dict[str, Any] = {"steps": 4, "warmup_steps": 3, "instances": 6, "pool": 9, "reuse": 2, "min_budget": 0.06}
SMALL |= {"teacher": "relevance"}
GROUP: dict[str, Any] = {"group": 4, "candidates": 1}
LEAVE_OUT: dict[str, Any] = {"teacher": "leave_one_out", "teacher_cells": 2}
TRAININGS: dict[str, tuple[Any, Any, bool]] = {
    "grpo in turn": (GRPO, GRPOConfig(**SMALL, **GROUP), True),
    "grpo with candidates": (GRPO, GRPOConfig(**SMALL | {"instances": 3}, group=6, candidates=2, probes=3), True),
    "grpo with KL": (GRPO, GRPOConfig(**SMALL, **GROUP, kl_weight=0.1), False),
    "grpo, leave one out": (
        GRPO,
        GRPOConfig(**SMALL | GROUP | LEAVE_OUT),
        False,
    ),
    "reinforce": (Reinforce, ReinforceConfig(**SMALL, group=2), False),
    "imitation": (Imitation, ImitationConfig(steps=5, instances=6, pool=9, reuse=2, teacher="leave_one_out"), False),
    "gumbel": (GumbelTopK, GumbelTopKConfig(**SMALL), False),
    "sigmoid": (SigmoidGates, SigmoidGatesConfig(**SMALL), False),
    "soft": (SoftTopK, SoftTopKConfig(**SMALL), False),
}


def uneven(example: Any) -> int:
    return 12 + len(example.question) % 5


@pytest.fixture(autouse=True)
def on_the_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relaxed, "check_gates", lambda vlm: vlm)
    monkeypatch.setattr(relaxed, "gated_log_likelihood", fake_likelihood)


def make(name: str, reward: str = "log_likelihood") -> Any:
    kind, config, in_turn = TRAININGS[name]
    vlm = FakeVLM(count=uneven if kind in (GRPO, Reinforce) else None)
    torch.manual_seed(0)
    scorer = Scorer(ScorerConfig(token_width=WIDTH, width=32, blocks=1, heads=2, in_turn=in_turn))
    pool = ExamplePool(vlm, FakeTask(40), "train", config.pool, config.reuse, seed=1)
    return kind(vlm, pool, scorer, config, reward, 2)


def digest(trainer: Any) -> str:
    data = b"".join(value.numpy().tobytes() for value in trainer.scorer.state_dict().values())
    return hashlib.sha256(data).hexdigest()


def plain(metrics: Metrics) -> tuple[Any, ...]:
    timed = {"seconds", "scoring_seconds"}
    return metrics.phase, metrics.step, {key: value for key, value in metrics.values.items() if key not in timed}


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_continues_bit_for_bit_from_any_step(name: str, tmp_path: Path) -> None:
    whole = make(name)
    taken, told = [], []
    for number, metrics in enumerate(whole.train()):
        told.append(plain(metrics))
        whole.snapshot().write(tmp_path / f"{number}.safetensors")
        taken.append(number)
    assert len(told) == (5 if name == "imitation" else 7)
    for number in taken:
        other = make(name)
        other.restore(Snapshot.read(tmp_path / f"{number}.safetensors"))
        assert [plain(metrics) for metrics in other.train()] == told[number + 1 :]
        assert digest(other) == digest(whole)


def test_the_distribution_of_first_tokens_comes_back(tmp_path: Path) -> None:
    whole = make("grpo with KL", "agreement")
    steps = whole.train()
    for _ in range(5):
        next(steps)
    whole.snapshot().write(tmp_path / "s")
    other = make("grpo with KL", "agreement")
    other.restore(Snapshot.read(tmp_path / "s"))
    assert [plain(metrics) for metrics in other.train()] == [plain(metrics) for metrics in steps]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:-3],
        lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
        lambda data: b"",
        lambda data: b"{}" * 100,
    ],
)
def test_damaged_snapshots_are_refused(spoil: Callable[[bytes], bytes], tmp_path: Path) -> None:
    trainer, path = make("imitation"), tmp_path / "s.safetensors"
    trainer.snapshot().write(path)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=r"s\.safetensors is damaged"):
        Snapshot.read(path)


def test_a_snapshot_of_another_network_is_refused() -> None:
    trainer, other = make("grpo in turn"), make("grpo with KL")
    next(trainer.train())
    with pytest.raises(ValueError, match="network of another kind"):
        other.restore(trainer.snapshot())
