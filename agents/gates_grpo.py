"""GRPO that begins where gates end: first by gradients through the model, then by rewards.

Gradients through relaxed gates learn fast, but of a question that nobody will ask: what half-open gates are worth. With
rewards a scorer learns slowly, but exactly what is wanted. One after the other, in the time of either, both do what
they are good at. Nothing has to be converted: independent gates, given that k of them are open, are the k-subset
distribution of the same scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from agents.grpo import GRPO, GRPOConfig, Metrics
from agents.learning import check_numbers
from agents.pool import ExamplePool
from agents.relaxed import SigmoidGates, SigmoidGatesConfig
from agents.scorer import Scorer
from grip_env.envs.rewards import Reward
from grip_env.vlms.base import FrozenVLM

__all__ = ["GatesGRPO", "GatesGRPOConfig"]


@dataclass
class GatesGRPOConfig(GRPOConfig):
    """GRPO after a second part of the warm-up: gradients through sigmoid gates (see --algo sigmoid-gates)."""

    steps: int = 230
    """Policy updates with rewards."""
    learning_rate: float = 5e-4
    """Peak learning rate of these updates; decays to 2% of it along a cosine."""
    gate_steps: int = 300
    """Updates by back-propagation through gates, after the warm-up and before the first reward."""
    gate_instances: int = 32
    """Examples per step of them."""
    gate_learning_rate: float = 1e-3
    """Their peak learning rate; decays along a cosine of its own."""


class GatesGRPO(GRPO):
    """Trains a scorer by sigmoid gates and then by GRPO; see :class:`~agents.grpo.GRPO` for the arguments.

    Raises:
        NotImplementedError: If the model is of a family whose attention cannot be gated.
        ValueError: If a setting is impossible, or the reward is not the answer's log-likelihood, the only one that
            gradients reach.
    """

    def __init__(
        self,
        vlm: FrozenVLM,
        pool: ExamplePool,
        scorer: Scorer,
        config: GatesGRPOConfig,
        reward: str | Reward = "log_likelihood",
        seed: int = 0,
    ) -> None:
        super().__init__(vlm, pool, scorer, config, reward, seed)
        check_numbers(config, {"gate_steps": 0, "gate_instances": 1}, above_0=("gate_learning_rate",))
        gates = SigmoidGatesConfig(
            steps=config.gate_steps,
            instances=config.gate_instances,
            min_budget=config.min_budget,
            max_budget=config.max_budget,
            budget_tilt=config.budget_tilt,
            learning_rate=config.gate_learning_rate,
            max_gradient_norm=config.max_gradient_norm,
            warmup_steps=0,
            pool=config.pool,
            reuse=config.reuse,
        )
        self._gates = SigmoidGates(vlm, pool, scorer, gates, reward, seed)

    def _prepare(self) -> Iterator[Metrics]:
        yield from super()._prepare()
        yield from self._gates.train()
