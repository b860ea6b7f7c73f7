"""Group-relative policy optimisation over subsets of visual tokens.

How it departs from GRPO as Shao et al. (DeepSeekMath, 2024) have it for language: an action is one subset, drawn
from the exact k-subset distribution, so that there is one log-probability per episode and no per-token ratio; the
reward is continuous, so that the group's standard deviation has a floor; one on-policy update per batch is the
default, which makes the ratio 1 and the printed loss meaningless (its gradient is not: watch reward and entropy).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch

from agents.pool import ExamplePool
from agents.scorer import Scorer
from agents.subset import KSubset
from agents.warmup import TEACHERS, warmup_loss
from grip_env.envs.rewards import Reward, needs_agreement, resolve_reward
from grip_env.envs.sampling import tokens_in_budget
from grip_env.vlms.base import Encoded, FrozenVLM

__all__ = ["GRPO", "GRPOConfig", "advantages", "surrogate"]


@dataclass
class GRPOConfig:
    """Group-relative policy optimisation (GRPO)."""

    steps: int = 360
    """Policy updates with rewards."""
    instances: int = 32
    """Examples per step (B)."""
    group: int = 16
    """Subsets drawn for each example (G)."""
    min_budget: float = 0.03
    """Smallest share of tokens kept in training; budgets are log-uniform and differ within a batch."""
    max_budget: float = 0.5
    """Largest share of tokens kept in training."""
    learning_rate: float = 5e-4
    """Peak learning rate of AdamW; decays to 2% of it along a cosine."""
    max_gradient_norm: float = 1.0
    """Gradients are clipped to this norm."""
    scale: Literal["group", "batch", "none"] = "group"
    """What advantages are divided by: the standard deviation in the group, in the batch, or nothing (Dr. GRPO,
    Liu et al. 2025)."""
    std_floor: float = 0.1
    """Added to that standard deviation: continuous rewards make tiny ones, which would blow noise up."""
    clip_low: float = 0.2
    """Ratios below 1 - clip_low earn nothing more (PPO, Schulman et al. 2017)."""
    clip_high: float = 0.28
    """Ratios above 1 + clip_high earn nothing more (a larger bound upwards: DAPO, Yu et al. 2025)."""
    epochs: int = 1
    """Updates per batch of rewards; clipping matters from 2 on."""
    kl_weight: float = 0.0
    """Weight of KL(policy || warmed-up policy), in closed form."""
    entropy_weight: float = 0.0
    """Weight of an entropy bonus per kept token."""
    warmup_steps: int = 120
    """Supervised steps before the first reward; 0 starts from uniform sampling."""
    warmup_learning_rate: float = 1e-3
    """Learning rate of the warm-up."""
    teacher: Literal["gradient", "attention", "relevance"] = "gradient"
    """Whose choices the warm-up imitates."""
    pool: int = 768
    """Encoded training examples held in memory."""
    reuse: int = 4
    """About how often each is used before a new one takes its place."""


def advantages(rewards: torch.Tensor, scale: str = "group", floor: float = 0.1) -> torch.Tensor:
    """Return rewards relative to their group, (B, G).

    Args:
        rewards: float (B, G).
        scale: Divide by the standard deviation of the "group" or of the whole "batch", or by nothing ("none").
        floor: Added to the standard deviation.

    >>> advantages(torch.tensor([[1.0, 3.0]]), "none")
    tensor([[-1.,  1.]])
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    if scale == "group":
        return centred / (centred.square().mean(1, keepdim=True).sqrt() + floor)
    if scale == "batch":
        return centred / (centred.square().mean().sqrt() + floor)
    if scale == "none":
        return centred
    raise ValueError(f"unknown advantage scale {scale!r}: choose group, batch or none")


def surrogate(
    log_prob: torch.Tensor, old: torch.Tensor, advantage: torch.Tensor, clip_low: float, clip_high: float
) -> torch.Tensor:
    """Return the clipped surrogate objective of each subset (to be maximised), same shape as the inputs."""
    ratio = (log_prob - old).exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)


@dataclass
class Metrics:
    """What one step did, for the progress bar, the log and TensorBoard."""

    phase: str
    step: int
    values: dict[str, float] = field(default_factory=dict)


class GRPO:
    """Trains a scorer against a frozen vision-language model.

    Args:
        vlm: The frozen model.
        pool: Training examples.
        scorer: What is trained, in place.
        config: Hyperparameters.
        reward: A reward, or a text that stands for one: see :func:`~grip_env.envs.rewards.resolve_reward`. All subsets
            of a group have one size, so that :class:`~grip_env.envs.rewards.KeptFraction` changes nothing but numbers.
        seed: Decides budgets and subsets.
    """

    def __init__(
        self,
        vlm: FrozenVLM,
        pool: ExamplePool,
        scorer: Scorer,
        config: GRPOConfig,
        reward: str | Reward = "log_likelihood",
        seed: int = 0,
    ) -> None:
        if not 0 < config.min_budget <= config.max_budget <= 1:
            raise ValueError(
                f"budgets must satisfy 0 < min_budget <= max_budget <= 1; got {config.min_budget}, {config.max_budget}"
            )
        for name, least in (("instances", 1), ("epochs", 1), ("steps", 0), ("warmup_steps", 0)):
            if getattr(config, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(config, name)}")
        # a floor of 0 would divide by 0 in every group of equal rewards
        for name in ("learning_rate", "warmup_learning_rate", "max_gradient_norm", "std_floor"):
            if not 0 < getattr(config, name) < math.inf:
                raise ValueError(f"{name} must be above 0; got {getattr(config, name)}")
        for name in ("clip_low", "clip_high", "kl_weight"):
            if not 0 <= getattr(config, name) < math.inf:
                raise ValueError(f"{name} must not be negative; got {getattr(config, name)}")
        if config.group < 2:
            raise ValueError(f"a group needs at least 2 subsets to compare; got group={config.group}")
        if config.instances > pool.size:
            raise ValueError(
                f"a step needs as many examples as the pool holds, at most; got instances={config.instances} and "
                f"pool={pool.size}: choose a larger pool"
            )
        if config.teacher not in TEACHERS:
            raise ValueError(f"unknown teacher {config.teacher!r}: choose one of {', '.join(TEACHERS)}")
        self.vlm, self.pool, self.scorer, self.config = vlm, pool, scorer, config
        self.reward = resolve_reward(reward)
        self._generator = torch.Generator().manual_seed(seed)
        self._reference: Scorer | None = None

    def train(self) -> Iterator[Metrics]:
        """Run warm-up and policy optimisation, yielding after every step; the scorer is usable at any point."""
        yield from self._warm_up()
        yield from self._optimise()

    def draw_counts(self, encoded: Encoded) -> torch.Tensor:
        """Draw a subset size for each example, long (B,): log-uniform over the budgets, spread evenly in a batch."""
        low, high = math.log(self.config.min_budget), math.log(self.config.max_budget)
        count = len(encoded)
        place = torch.randperm(count, generator=self._generator) + torch.rand(count, generator=self._generator)
        budget = (low + (high - low) * place / count).exp()
        pairs = zip(budget.tolist(), encoded.token_mask.sum(1).tolist(), strict=True)
        return torch.tensor([tokens_in_budget(*pair) for pair in pairs], device=encoded.tokens.device)

    def _optimizer(self, rate: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.scorer.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)

    def _apply(self, loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> float:
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.scorer.parameters(), self.config.max_gradient_norm)
        optimizer.step()
        return float(norm)

    def _warm_up(self) -> Iterator[Metrics]:
        config = self.config
        optimizer = self._optimizer(config.warmup_learning_rate)
        self.scorer.train()
        for step in range(config.warmup_steps):
            encoded, _ = self.pool.batch(config.instances, needs_agreement(self.reward))
            teacher = TEACHERS[config.teacher](self.vlm, encoded)
            loss = warmup_loss(self.scorer, encoded, teacher, self.draw_counts(encoded))
            norm = self._apply(loss, optimizer)
            yield Metrics("warmup", step, {"loss": float(loss.detach()), "gradient_norm": norm})
        if config.kl_weight:
            self._reference = Scorer(self.scorer.config)
            self._reference.load_state_dict(self.scorer.state_dict())
            self._reference.eval().requires_grad_(False)

    def _policy(self, scorer: Scorer, encoded: Encoded, kept: torch.Tensor) -> KSubset:
        return KSubset(scorer.score(encoded, kept), kept, mask=encoded.token_mask, validate_args=False)

    def _optimise(self) -> Iterator[Metrics]:
        config = self.config
        optimizer = self._optimizer(config.learning_rate)
        self.scorer.train()
        for step in range(config.steps):
            decay = 0.51 + 0.49 * math.cos(math.pi * step / config.steps)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * decay
            started = time.perf_counter()
            encoded, full = self.pool.batch(config.instances, needs_agreement(self.reward))
            kept = self.draw_counts(encoded)
            policy = self._policy(self.scorer, encoded, kept)
            subsets = policy.sample(torch.Size((config.group,)), generator=self._generator)  # (G, B, N)
            scoring = time.perf_counter()
            scores = self.vlm.score(encoded, subsets.transpose(0, 1).contiguous(), reference=full.first_token)
            scoring = time.perf_counter() - scoring
            reward = self.reward(scores, full)
            if reward.shape != scores.log_likelihood.shape:  # (B, 1), for one, would teach nothing and not fail
                raise ValueError(
                    f"the reward {self.reward!r} gave shape {tuple(reward.shape)}, expected "
                    f"{tuple(scores.log_likelihood.shape)}: one number for each selection of each example"
                )
            advantage = advantages(reward, config.scale, config.std_floor).T  # (G, B)
            old: torch.Tensor | None = None
            for epoch in range(config.epochs):
                if epoch:
                    policy = self._policy(self.scorer, encoded, kept)
                log_prob = policy.log_prob(subsets)  # (G, B)
                old = log_prob.detach() if old is None else old
                objective = surrogate(log_prob, old, advantage, config.clip_low, config.clip_high).mean()
                if config.kl_weight and self._reference is not None:
                    with torch.no_grad():
                        reference = self._policy(self._reference, encoded, kept)
                    objective = (
                        objective - config.kl_weight * torch.distributions.kl_divergence(policy, reference).mean()
                    )
                if config.entropy_weight:
                    objective = objective + config.entropy_weight * (policy.entropy() / kept).mean()
                norm = self._apply(-objective, optimizer)
            with torch.no_grad():
                entropy = float((policy.entropy() / kept).mean())
            spread = reward.std(1)
            small = kept <= kept.float().quantile(0.125)  # the lowest eighth of the budgets
            yield Metrics(
                "grpo",
                step,
                {
                    "reward": float(reward.mean()),
                    "reward_smallest_budgets": float(reward[small].mean()),
                    "log_likelihood": float(scores.log_likelihood.mean()),
                    "log_likelihood_smallest_budgets": float(scores.log_likelihood[small].mean()),
                    "accuracy": float(scores.correct.float().mean()),
                    "group_std": float(spread.mean()),
                    "flat_groups": float((spread < 0.01).float().mean()),
                    "entropy_per_token": entropy,
                    "gradient_norm": norm,
                    "learning_rate": config.learning_rate * decay,
                    "seconds": time.perf_counter() - started,
                    "scoring_seconds": scoring,
                },
            )
