"""Continuous relaxations: training of the scorer by gradients through the frozen model.

Selecting tokens is a discrete choice, through which no gradient passes. A relaxation passes gradients through gates
between 0 and 1, in one of three ways: :class:`GumbelTopK`, :class:`SigmoidGates` and :class:`SoftTopK`. All three act
on the model's attention and train the same scorer as GRPO, after a warm-up of the same length and on examples and
budgets drawn in the same way. After training, the k best-scoring tokens are kept. They are baselines for GRPO: where
they win, learning from rewards is not worth its cost.

With "straight-through" gates (Bengio, Léonard & Courville, "Estimating or propagating gradients through stochastic
neurons", 2013, arXiv 1308.3432), the forward pass uses 0 and 1, as in the final evaluation, and the backward pass uses
the gradient of soft gates. ``leak``, which is not from these papers, helps as much: the likelihood saturates in a
token's gate, so its slope at 0 can be a thousand times the value of the whole token. The gradient is more informative
if a gate never closes fully.
"""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Iterator

import torch

from agents.base import top_k
from agents.learning import Metrics, draw_counts, draw_readable, finite_rows, lowest_eighth
from agents.pool import ExamplePool
from agents.scorer import Scorer
from agents.subset import KSubset
from agents.training.imitation import WarmedUp
from agents.training.options import (
    RelaxedConfig,
    SigmoidGatesConfig,
    check_batch,
    check_budgets,
    check_numbers,
    check_on_nan,
)
from agents.training.snapshot import Snapshot
from agents.training.soft_gates import (
    CLOSED_BELOW,
    binary_gates,
    budget_offset,
    budget_penalty,
    gumbel_noise,
    relaxed_top_k,
    straight_through,
)
from grip_env.common.finite import named_step
from grip_env.rewards.parsing import resolve_reward
from grip_env.rewards.terms import AnswerLogLikelihood, Reward
from grip_env.vlms.base import FrozenVLM
from grip_env.vlms.gated import check_gates, gated_log_likelihood

__all__ = ["GumbelTopK", "SigmoidGates", "SoftTopK"]


class Relaxation(WarmedUp):
    """Training of a scorer by back-propagation through a frozen vision-language model.

    Args:
        vlm: The frozen model, of a family that :func:`~grip_env.vlms.gated.gated_log_likelihood` can gate.
        pool: Training examples.
        scorer: The scorer, trained in place.
        config: Hyperparameters.
        reward: Must be the answer's log-likelihood, because a gradient has to pass through it.
        seed: Seed of budgets and noise.

    Raises:
        NotImplementedError: If the model cannot be gated.
        ValueError: If the reward is a different one, or a setting is invalid.
    """

    def __init__(
        self,
        vlm: FrozenVLM,
        pool: ExamplePool,
        scorer: Scorer,
        config: RelaxedConfig,
        reward: str | Reward = "log_likelihood",
        seed: int = 0,
    ) -> None:
        if resolve_reward(reward) != AnswerLogLikelihood():
            raise ValueError(
                f"{type(self).__name__} learns by gradients through the model, which reach log_likelihood only; got "
                f"the reward {reward!r}: choose log_likelihood, or GRPO for any other"
            )
        if config.samples < 1:
            raise ValueError(f"samples must be at least 1; got {config.samples}")
        for name in ("temperature", "final_temperature"):
            if not 0 < getattr(config, name) < math.inf:
                raise ValueError(f"{name} must be above 0; got {getattr(config, name)}")
        for name in ("leak", "final_leak"):
            if not 0 <= getattr(config, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1; got {getattr(config, name)}")
        if config.in_turn:
            scorer.check_in_turn(True)
        self._gated = check_gates(vlm)
        check_budgets(config.min_budget, config.max_budget, config.budget_tilt)
        check_on_nan(config.on_nan)
        check_numbers(config, {"steps": 0, "warmup_steps": 0}, ("learning_rate", "max_gradient_norm"))
        check_batch(config.instances, pool.size)
        self.config = config
        super().__init__(vlm, pool, scorer, config, reward, seed)

    @abstractmethod
    def gates(
        self, scores: torch.Tensor, counts: torch.Tensor, mask: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw gates.

        Args:
            scores: Scores of the tokens, float (B, N).
            counts: How many tokens the budget allows, long (B,).
            mask: Which tokens are real, bool (B, N).
            temperature: Temperature of the relaxation; higher is softer.

        Returns:
            Gates in [0, 1], float (S, B, N), for each of S draws (one if nothing is random), and a cost that is added
            to the loss, float (B,).
        """

    def _optimise(self) -> Iterator[Metrics]:
        config = self.config
        learner = self._learner
        assert learner is not None
        self.scorer.train()
        for step in range(self._done, config.steps):
            started = time.perf_counter()
            learner.begin(step)
            annealed = step / max(1, config.steps - 1)
            temperature = config.temperature ** (1 - annealed) * config.final_temperature**annealed
            leak = config.leak * (1 - annealed) + config.final_leak * annealed
            with named_step(self.phase, step):
                encoded, full, skipped = draw_readable(self.pool, config.instances, config.on_nan)
            self._done = step + 1
            if not len(encoded):
                continue
            counts = draw_counts(encoded, config.min_budget, config.max_budget, self._generator, config.budget_tilt)
            gates, cost = self.gates(self.scorer.score(encoded, counts), counts, encoded.token_mask, temperature)
            gates = (leak + (1 - leak) * gates).transpose(0, 1)  # (B, S, N)
            likelihood = gated_log_likelihood(self._gated, encoded, gates)  # (B, S)
            self.pool.compute.add(likelihood.numel(), backward=True)
            norm = 0.0
            with named_step(self.phase, step):
                both = torch.cat([likelihood, full.log_likelihood], 1)
                good = finite_rows(both, "the answer's log-likelihood", encoded, config.on_nan).nonzero()[:, 0]
                skipped += len(encoded) - len(good)
                if len(good) < len(encoded):
                    encoded, counts, full, gates = encoded[good], counts[good], full[good], gates[good]
                    cost, likelihood = cost[good], likelihood[good]
                if len(good):
                    norm = learner.minimise((cost - likelihood.mean(1)).mean())
            if not len(good):
                continue
            gain = (likelihood.detach() - full.log_likelihood).mean(1)
            small = lowest_eighth(counts)
            opened = ((gates.detach() > 0.5) & encoded.token_mask[:, None]).sum(-1) / counts[:, None]
            values = {
                "reward": float(gain.mean()),
                "reward_smallest_budgets": float(gain[small].mean()),
                "log_likelihood": float(likelihood.detach().mean()),
                "log_likelihood_smallest_budgets": float(likelihood.detach()[small].mean()),
                "open_gates": float(opened.mean()),
                "cost": float(cost.detach().mean()),
                "temperature": temperature,
                "leak": leak,
                "gradient_norm": norm,
                **({"skipped": skipped} if config.on_nan == "skip" else {}),
                "learning_rate": learner.learning_rate,
                "seconds": time.perf_counter() - started,
                "forwards": self.pool.compute.forwards,
            }
            yield Metrics(self.phase, step, values)


class GumbelTopK(Relaxation):
    """Relaxation that keeps the k best scores under Gumbel noise.

    The gradient is from k successive softmaxes; see :func:`~agents.training.soft_gates.relaxed_top_k`.

    Sources: Jang, Gu & Poole, "Categorical reparameterization with Gumbel-softmax", ICLR 2017; Maddison, Mnih & Teh,
    ICLR 2017; Kool et al., ICML 2019 (top-k); Xie & Ermon, IJCAI 2019 (its relaxation).
    """

    phase = "gumbel"

    def gates(
        self, scores: torch.Tensor, counts: torch.Tensor, mask: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw gates; see :meth:`Relaxation.gates`."""
        samples = self.config.samples
        noise = gumbel_noise(scores, samples, self._generator) if self.config.noisy else scores.new_zeros(1, 1, 1)
        noisy = scores + noise  # (S, B, N)
        soft = relaxed_top_k(noisy, counts, mask, temperature)
        if self.config.hard:
            gates = straight_through(torch.stack([top_k(part, counts, mask) for part in noisy.detach()]), soft)
        else:
            gates = soft.clamp_max(1)
        return gates, scores.new_zeros(len(scores))


class SigmoidGates(Relaxation):
    """Relaxation with independent gates and a penalty for missing the budget.

    Gates are straight-through Bernoulli draws if ``hard``, otherwise hard-concrete draws. Scores are shifted by the
    log-odds of the budget and by a constant, found on the first batch, with which the expected number of open gates
    meets the budgets on average.

    Sources: Louizos et al., ICLR 2018; Maddison et al., ICLR 2017; the penalty on the kept share after DynamicViT (Rao
    et al., NeurIPS 2021), here on its logarithm, so that small budgets count as much as large ones.
    """

    phase = "sigmoid"
    config: SigmoidGatesConfig

    def __init__(
        self,
        vlm: FrozenVLM,
        pool: ExamplePool,
        scorer: Scorer,
        config: SigmoidGatesConfig,
        reward: str | Reward = "log_likelihood",
        seed: int = 0,
    ) -> None:
        if not 0 <= config.penalty < math.inf:
            raise ValueError(f"penalty must not be negative; got {config.penalty}")
        super().__init__(vlm, pool, scorer, config, reward, seed)
        self._offset: float | None = None

    def snapshot(self) -> Snapshot:
        """Return the state of the training; see :class:`WarmedUp`."""
        whole = super().snapshot()
        return Snapshot(whole.tensors, whole.about | {"offset": self._offset})

    def restore(self, snapshot: Snapshot) -> None:
        """Continue where a snapshot was taken; see :class:`WarmedUp`."""
        super().restore(snapshot)
        self._offset = snapshot.about["offset"]

    def gates(
        self, scores: torch.Tensor, counts: torch.Tensor, mask: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw gates; see :meth:`Relaxation.gates`."""
        config = self.config
        share = (counts / mask.sum(1)).clamp_max(1 - 1e-4)
        logits = scores + share.logit()[:, None]
        if self._offset is None:
            self._offset = budget_offset(logits.detach(), counts, mask)
        logits = logits + self._offset  # logits of a gate being open
        # a hard gate is open above 1/2, a stretched one above 0
        shift = 0.0 if config.hard else temperature * CLOSED_BELOW
        shape = (config.samples, *scores.shape) if config.noisy else (1, *scores.shape)
        uniform = torch.rand(shape, generator=self._generator) if config.noisy else torch.full(shape, 0.5)
        soft = binary_gates(logits + shift, uniform.to(scores.device), temperature, not config.hard)
        gates = straight_through(soft > 0.5, soft) if config.hard else soft
        return gates * mask, config.penalty * budget_penalty(logits, counts, mask)


class SoftTopK(Relaxation):
    """Relaxation that draws exact k-subsets and uses the gradient of their marginals.

    Marginals are the probabilities of each token to be in the subset. Without ``hard``, the gates are the marginals
    themselves; without ``noisy``, the subset is the most likely one.

    Source: Ahmed, Zeng, Niepert & Van den Broeck, "SIMPLE: a gradient estimator for k-subset sampling", ICLR 2023.
    """

    phase = "soft_top_k"

    def gates(
        self, scores: torch.Tensor, counts: torch.Tensor, mask: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw gates; see :meth:`Relaxation.gates`."""
        policy = KSubset(scores / temperature, counts, mask, validate_args=False)
        gates = policy.marginals[None]  # (1, B, N)
        if self.config.hard:
            draws = torch.Size((self.config.samples,))
            hard = policy.sample(draws, generator=self._generator) if self.config.noisy else policy.mode[None]
            gates = straight_through(hard, gates)
        return gates, scores.new_zeros(len(scores))
