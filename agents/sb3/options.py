"""Options of the algorithms of Stable-Baselines3."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from agents.training.options import WarmUpOptions, check_batch, check_budgets, check_numbers

__all__ = ["A2COptions", "MaskablePPOOptions", "PPOOptions"]


@dataclass
class _Gathering:
    """What they have beyond their warm-up."""

    steps: int = 170
    """Updates: each follows n_steps steps of all environments."""
    num_envs: int = 64
    """Environments that step together, with one call of the language model."""
    n_steps: int = 2
    """Steps of each environment between updates; one step is one image where all is chosen at once."""
    learning_rate: float = 3e-4
    """Learning rate of Adam (Kingma & Ba, ICLR 2015) at the first update."""
    anneal: bool = True
    """Let the learning rate fall to 0 along a line (PPO, Schulman et al. 2017, arXiv 1707.06347)."""
    gamma: float = 1.0
    """Discount; less than 1 would pay for gaining early rather than for the final set."""
    gae_lambda: float = 1.0
    """Generalised advantage estimation (Schulman et al., ICLR 2016); without effect where an episode is one step."""
    entropy_weight: float = 0.0
    """Weight of an entropy bonus, in nats per action (A3C, Mnih et al., ICML 2016)."""
    value_weight: float = 0.5
    """Weight of the value's squared error; actor and critic share a network (A3C, Mnih et al., ICML 2016)."""
    examples: int = 2048
    """Training examples the environments draw from, all held encoded in memory: each costs the vision encoder and one
    more forward pass, that of the full image, once; 0 takes the whole split and holds few."""
    obs_dtype: Literal["float32", "float16"] = "float16"
    """Precision of features in observations, of which the rollout buffer holds num_envs * n_steps."""
    max_tokens: int | None = None
    """Most visual tokens an image may have, by default as many as the first one has; give it where images differ."""
    max_question_tokens: int = 64
    """Most tokens a question may have; the scorer reads 64."""


@dataclass
class _Common(WarmUpOptions, _Gathering):
    """What all have."""

    instances: int = 32
    """Examples per step of the warm-up."""

    def check(self) -> None:
        """Raise ValueError, naming the option, if a setting is impossible."""
        check_budgets(self.min_budget, self.max_budget)
        check_numbers(
            self,
            {"steps": 0, "num_envs": 1, "n_steps": 1, "examples": 0, "max_question_tokens": 1, "warmup_steps": 0},
            above_0=("learning_rate", "warmup_learning_rate", "max_gradient_norm"),
            not_negative=("entropy_weight", "value_weight"),
        )
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1; got {getattr(self, name)}")
        check_batch(self.instances, self.pool)


@dataclass
class _OneShot(_Common):
    """Where all tokens are chosen at once."""

    action_mode: Literal["binary", "scores"] = "binary"
    """A coin for each token, or a normally distributed score for each, of which the highest are kept."""
    log_std_init: float = -2.0
    """Logarithm of the scores' first standard deviation; much above -2, they run into the bounds of [-1, 1]."""
    over_budget_penalty: float = 0.0
    """Charged for each token that binary actions keep beyond the budget; those are dropped at random anyway."""

    def check(self) -> None:
        """Raise ValueError, naming the option, if a setting is impossible."""
        super().check()
        if not math.isfinite(self.log_std_init):
            raise ValueError(f"log_std_init must be finite; got {self.log_std_init}")


@dataclass
class _Clipped(_Common):
    """What PPO has beyond A2C."""

    batch_size: int = 64
    """Observations per gradient step; divides num_envs * n_steps."""
    epochs: int = 2
    """How often an update goes through what was gathered (PPO, Schulman et al. 2017)."""
    clip_range: float = 0.2
    """Ratios further than this from 1 earn nothing more (PPO, Schulman et al. 2017)."""
    target_kl: float | None = None
    """End an update early when the policy has moved by more than 1.5 times this, in nats per action."""

    def check(self) -> None:
        """Raise ValueError, naming the option, if a setting is impossible."""
        super().check()
        # advantages are normalised within a batch, and a single one would be divided by no deviation
        check_numbers(self, {"batch_size": 2, "epochs": 1}, above_0=("clip_range",))
        if self.target_kl is not None:
            check_numbers(self, {}, above_0=("target_kl",))
        gathered = self.num_envs * self.n_steps
        if gathered % self.batch_size:
            raise ValueError(
                f"batch_size must divide num_envs * n_steps = {self.num_envs} * {self.n_steps} = {gathered}; got "
                f"{self.batch_size}"
            )


@dataclass
class A2COptions(_OneShot):
    """Advantage actor-critic (A2C, the synchronous form of A3C; Mnih et al., ICML 2016)."""

    steps: int = 500
    """Updates: each follows n_steps steps of all environments."""
    n_steps: int = 1
    """Steps of each environment between updates; one step is one image."""
    learning_rate: float = 7e-4
    """Learning rate of Adam (Kingma & Ba, ICLR 2015) at the first update."""
    normalize_advantage: bool = True
    """Bring the advantages of an update to mean 0 and standard deviation 1, as PPO does (Andrychowicz et al., ICLR
    2021); until the value is learnt, all are of one sign otherwise."""

    def check(self) -> None:
        """Raise ValueError, naming the option, if a setting is impossible."""
        super().check()
        if self.normalize_advantage and self.num_envs * self.n_steps < 2:
            raise ValueError(
                "normalize_advantage needs at least 2 steps per update; got num_envs * n_steps = 1: gather more"
            )


@dataclass
class PPOOptions(_Clipped, _OneShot):
    """Proximal policy optimisation (PPO; Schulman et al. 2017, arXiv 1707.06347), one decision per episode."""


@dataclass
class MaskablePPOOptions(_Clipped):
    """PPO token by token, with illegal actions masked (Huang & Ontanon, FLAIRS 2022, arXiv 2006.14171)."""

    steps: int = 80
    """Updates: each follows n_steps steps of all environments."""
    num_envs: int = 32
    """Environments that step together, with one call of the language model."""
    n_steps: int = 8
    """Steps of each environment between updates; one step is one token."""
    gae_lambda: float = 0.95
    """Generalised advantage estimation (Schulman et al., ICLR 2016)."""
    dense: bool = True
    """Pay each token for what it changed (potential-based shaping; Ng, Harada & Russell, ICML 1999), which asks the
    language model at every step; otherwise the last alone is paid, and asked about."""
