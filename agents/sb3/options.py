"""Options of the Stable-Baselines3 algorithms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from agents.training.options import WarmUpOptions, check_batch, check_budgets, check_numbers

__all__ = ["A2COptions", "MaskablePPOOptions", "PPOOptions"]


@dataclass
class _Gathering:
    """Options of all algorithms beyond their warm-up."""

    steps: int = 170
    """Updates: each follows n_steps steps of all environments."""
    num_envs: int = 64
    """Environments that step together, with one call of the language model."""
    n_steps: int = 2
    """Steps of each environment between updates; one step is one image if its tokens are chosen jointly."""
    learning_rate: float = 3e-4
    """Learning rate of Adam (Kingma & Ba, ICLR 2015) at the first update."""
    anneal: bool = True
    """Decay the learning rate linearly to 0 (PPO, Schulman et al. 2017, arXiv 1707.06347)."""
    gamma: float = 1.0
    """Discount factor; below 1, early gains would count more than the final set."""
    gae_lambda: float = 1.0
    """Lambda of generalised advantage estimation (Schulman et al., ICLR 2016); no effect if an episode is one step."""
    entropy_weight: float = 0.0
    """Weight of an entropy bonus, in nats per action (A3C, Mnih et al., ICML 2016)."""
    value_weight: float = 0.5
    """Weight of the value's squared error; actor and critic share a network (A3C, Mnih et al., ICML 2016)."""
    examples: int = 2048
    """Training examples that the environments draw from, all held encoded in memory. Each costs, once, a pass of the
    vision encoder and a forward pass of the full image. 0 draws from the whole split and holds only a few."""
    obs_dtype: Literal["float32", "float16"] = "float16"
    """Precision of the features in observations; the rollout buffer holds num_envs * n_steps observations."""
    max_tokens: int | None = None
    """Maximum number of visual tokens of an image, by default that of the first image; set it if images differ."""
    max_question_tokens: int = 64
    """Maximum number of tokens of a question; the scorer reads 64."""


@dataclass
class _Common(WarmUpOptions, _Gathering):
    """Options of all algorithms."""

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
    """Options of algorithms on the one-shot environment, which choose all tokens jointly."""

    action_mode: Literal["binary", "scores"] = "binary"
    """Actions: a Bernoulli draw for each token, or a normally distributed score for each, the highest of which win."""
    log_std_init: float = -2.0
    """Logarithm of the initial standard deviation of the scores; far above -2, they reach the bounds of [-1, 1]."""
    over_budget_penalty: float = 0.0
    """Penalty for each token that binary actions keep beyond the budget; such tokens are dropped at random anyway."""

    def check(self) -> None:
        """Raise ValueError, naming the option, if a setting is impossible."""
        super().check()
        if not math.isfinite(self.log_std_init):
            raise ValueError(f"log_std_init must be finite; got {self.log_std_init}")


@dataclass
class _Clipped(_Common):
    """Options of PPO beyond those of A2C."""

    batch_size: int = 64
    """Observations per gradient step; must divide num_envs * n_steps."""
    epochs: int = 2
    """Passes of an update over the rollout (PPO, Schulman et al. 2017)."""
    clip_range: float = 0.2
    """Clip: probability ratios further than this from 1 earn nothing more (PPO, Schulman et al. 2017)."""
    target_kl: float | None = None
    """Stop an update early when the policy has moved by more than 1.5 times this KL, in nats per action."""

    def check(self) -> None:
        """Raise ValueError, naming the option, if a setting is impossible."""
        super().check()
        # advantages are normalised within a batch, and a single one has no standard deviation
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
    """Normalise the advantages of an update to mean 0 and standard deviation 1, as PPO does (Andrychowicz et al., ICLR
    2021). Otherwise all have the same sign until the value is learnt."""

    def check(self) -> None:
        """Raise ValueError, naming the option, if a setting is impossible."""
        super().check()
        if self.normalize_advantage and self.num_envs * self.n_steps < 2:
            raise ValueError(
                "normalize_advantage needs at least 2 steps per update; got num_envs * n_steps = 1: gather more"
            )


@dataclass
class PPOOptions(_Clipped, _OneShot):
    """Proximal policy optimisation (PPO), one decision per episode.

    Schulman et al. 2017, arXiv 1707.06347.
    """


@dataclass
class MaskablePPOOptions(_Clipped):
    """PPO token by token, with illegal actions masked.

    Huang & Ontanon, FLAIRS 2022, arXiv 2006.14171.
    """

    steps: int = 80
    """Updates: each follows n_steps steps of all environments."""
    num_envs: int = 32
    """Environments that step together, with one call of the language model."""
    n_steps: int = 8
    """Steps of each environment between updates; one step is one token."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation (Schulman et al., ICLR 2016)."""
    dense: bool = True
    """Reward each token for the change it makes (potential-based shaping; Ng, Harada & Russell, ICML 1999), which runs
    the language model at every step; otherwise only the last step is scored and rewarded."""
