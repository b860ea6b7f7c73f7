"""Supervised imitation: the scorer learns the choices of a teacher, without rewards.

GRPO's warm-up is a short imitation. Imitation for as long as GRPO is a baseline that shows the value of the rewards.
"""

from __future__ import annotations

import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch

from agents.learning import Learner, Metrics, draw_counts, draw_readable, finite_rows
from agents.pool import ExamplePool
from agents.scorer import Scorer
from agents.training.options import (
    ImitationConfig,
    SharedOptions,
    WarmUpOptions,
    check_batch,
    check_budgets,
    check_numbers,
    check_on_nan,
)
from agents.training.snapshot import Snapshot
from agents.training.teachers import Remembered, make_teacher, warmup_loss
from grip_env.common.finite import named_step
from grip_env.rewards.parsing import resolve_reward
from grip_env.rewards.terms import Reward
from grip_env.vlms.base import FrozenVLM

__all__ = ["Imitation", "WarmedUp", "as_warm_up"]


def as_warm_up(options: WarmUpOptions) -> ImitationConfig:
    """Return an algorithm's warm-up as the options of an imitation at a constant learning rate."""
    shared = {field.name: getattr(options, field.name) for field in dataclasses.fields(SharedOptions)}
    return ImitationConfig(
        steps=options.warmup_steps,
        learning_rate=options.warmup_learning_rate,
        schedule="constant",
        on_nan=getattr(options, "on_nan", "stop"),
        **shared,
    )


class Imitation:
    """Supervised training of a scorer on the choices of a teacher.

    Args:
        vlm: The frozen model.
        pool: Training examples.
        scorer: The scorer, trained in place.
        config: Hyperparameters.
        reward: Not used; an invalid one raises an error, as for other algorithms.
        seed: Seed of the budgets.

    Raises:
        ValueError: If a setting is invalid.
    """

    phase = "imitation"
    """Name of its steps in :class:`~agents.learning.Metrics`."""

    def __init__(
        self,
        vlm: FrozenVLM,
        pool: ExamplePool,
        scorer: Scorer,
        config: ImitationConfig,
        reward: str | Reward = "log_likelihood",
        seed: int = 0,
    ) -> None:
        check_budgets(config.min_budget, config.max_budget)
        check_numbers(config, {"instances": 1, "steps": 0}, ("learning_rate", "max_gradient_norm"))
        check_batch(config.instances, pool.size)
        check_on_nan(config.on_nan)
        if config.schedule not in ("cosine", "constant"):
            raise ValueError(f"unknown schedule {config.schedule!r}: choose cosine or constant")
        resolve_reward(reward)
        self.vlm, self.pool, self.scorer, self.config = vlm, pool, scorer, config
        self.teacher = make_teacher(config.teacher, config.teacher_cells, pool.size)
        self.generator = torch.Generator().manual_seed(seed)
        """Source of the budgets; an algorithm that trains the scorer further goes on with it."""
        self.done = 0
        """Number of steps taken."""
        self._learner: Learner | None = None

    def snapshot(self) -> Snapshot:
        """Return the state of the training, with that of the scorer and the pool."""
        parts = {
            "scorer": Snapshot.of_module(self.scorer),
            "pool": self.pool.snapshot(),
            "generator": Snapshot.of_generator(self.generator),
            "learner": None if self._learner is None else self._learner.snapshot(),
            "teacher": self.teacher.snapshot(self.pool.examples) if isinstance(self.teacher, Remembered) else None,
        }
        return Snapshot.join(parts, done=self.done)

    def restore(self, snapshot: Snapshot) -> None:
        """Continue where :meth:`snapshot` was taken.

        Raises:
            ValueError: If it is of another training.
        """
        snapshot.part("scorer").load_into(self.scorer)
        self.pool.restore(snapshot.part("pool"))
        snapshot.part("generator").load_into_generator(self.generator)
        self.done = snapshot.about["done"]
        if "learner" in snapshot.about:
            self._learner = self._make_learner()
            self._learner.restore(snapshot.part("learner"))
        if isinstance(self.teacher, Remembered) and "teacher" in snapshot.about:
            self.teacher.restore(snapshot.part("teacher"), self.pool.examples)

    def _make_learner(self) -> Learner:
        config = self.config
        decay_over = config.steps if config.schedule == "cosine" else 0
        return Learner(self.scorer, config.learning_rate, config.max_gradient_norm, decay_over)

    def train(self) -> Iterator[Metrics]:
        """Train the scorer, yielding after every step; it is usable at any point."""
        return self.imitate(self.phase)

    def imitate(self, phase: str, first_token: bool = False) -> Iterator[Metrics]:
        """Train the scorer, yielding after every step.

        Args:
            phase: Name of the steps.
            first_token: Whether the pool will be asked for first tokens later.
        """
        config = self.config
        self._learner = learner = self._learner or self._make_learner()
        self.scorer.train()
        for step in range(self.done, config.steps):
            started = time.perf_counter()
            learner.begin(step)
            with named_step(phase, step):
                loss, norm, skipped = self._imitate_once(learner, first_token)
            self.done = step + 1
            yield Metrics(
                phase,
                step,
                {
                    "loss": loss,
                    "gradient_norm": norm,
                    **({"skipped": skipped} if config.on_nan == "skip" else {}),
                    "learning_rate": learner.learning_rate,
                    "seconds": time.perf_counter() - started,
                    "forwards": self.pool.compute.forwards,
                },
            )

    def _imitate_once(self, learner: Learner, first_token: bool) -> tuple[float, float, int]:
        """Take a step and return the loss, the gradient's norm and how many examples were left out."""
        config = self.config
        encoded, _, skipped = draw_readable(self.pool, config.instances, config.on_nan, first_token)
        if not len(encoded):
            return 0.0, 0.0, skipped
        teacher = self.teacher(self.vlm, encoded, self.pool.compute)
        counts = draw_counts(encoded, config.min_budget, config.max_budget, self.generator)
        good = finite_rows(teacher.masked_fill(~encoded.token_mask, 0), "the teacher's score", encoded, config.on_nan)
        rows = good.nonzero()[:, 0]
        skipped += len(encoded) - len(rows)
        if not len(rows):
            return 0.0, 0.0, skipped
        if len(rows) < len(encoded):
            encoded, teacher, counts = encoded[rows], teacher[rows], counts[rows]
        loss = warmup_loss(self.scorer, encoded, teacher, counts)
        norm = learner.minimise(loss)
        return float(loss.detach()), norm, skipped


class WarmedUp(ABC):
    """Training of a scorer in two phases: a warm-up by imitation, then steps of its own.

    Args:
        vlm: The frozen model.
        pool: Training examples.
        scorer: The scorer, trained in place.
        options: Hyperparameters of the warm-up and of the steps after it.
        reward: The reward.
        seed: Seed of the budgets.

    Raises:
        ValueError: If a setting of the warm-up is invalid.
    """

    phase: str
    """Name of the steps after the warm-up in :class:`~agents.learning.Metrics`; those before are "warmup"."""
    config: Any

    def __init__(
        self,
        vlm: FrozenVLM,
        pool: ExamplePool,
        scorer: Scorer,
        options: WarmUpOptions,
        reward: str | Reward,
        seed: int,
    ) -> None:
        self.vlm, self.pool, self.scorer = vlm, pool, scorer
        self._warm_up = Imitation(vlm, pool, scorer, as_warm_up(options), reward, seed)
        self._generator = self._warm_up.generator
        self._learner: Learner | None = None
        self._done = 0

    @property
    def _first_token(self) -> bool:
        """True if the pool will be asked for first tokens after the warm-up."""
        return False

    @abstractmethod
    def _optimise(self) -> Iterator[Metrics]:
        """Take the steps after the warm-up that are left."""

    def train(self) -> Iterator[Metrics]:
        """Run the warm-up and the steps after it, yielding metrics after every step.

        The scorer can be used after any step.
        """
        yield from self._warm_up.imitate("warmup", self._first_token)
        self._begin()
        yield from self._optimise()

    def _begin(self) -> None:
        """Make what the steps after the warm-up need, unless it is there."""
        if self._learner is None:
            config = self.config
            self._learner = Learner(self.scorer, config.learning_rate, config.max_gradient_norm, config.steps)

    def _parts(self) -> dict[str, Snapshot | None]:
        learner = None if self._learner is None else self._learner.snapshot()
        return {"warmup": self._warm_up.snapshot(), "learner": learner}

    def snapshot(self) -> Snapshot:
        """Return the state of the training, from which :meth:`restore` continues bit for bit."""
        return Snapshot.join(self._parts(), done=self._done)

    def restore(self, snapshot: Snapshot) -> None:
        """Continue where :meth:`snapshot` was taken.

        :meth:`train` then yields the steps that follow.

        Raises:
            ValueError: If it is of another training.
        """
        self._warm_up.restore(snapshot.part("warmup"))
        self._done = snapshot.about["done"]
        if "learner" in snapshot.about:
            self._begin()
            assert self._learner is not None
            self._learner.restore(snapshot.part("learner"))
