"""GRPO (group-relative policy optimisation), RLOO and REINFORCE over visual tokens.

Differences from GRPO for language models (Shao et al., DeepSeekMath, 2024): An action is one subset, with one
log-probability and no per-token ratio. By default its tokens are drawn one after another
(:mod:`agents.ordered_subset`), otherwise jointly from the exact k-subset distribution, whose KL to the policy after
the warm-up is exact, not estimated. Rewards are continuous, so the group's standard deviation has a floor. The default
is one on-policy update per batch: the ratio is then 1 and the value of the surrogate 0, though its gradient is not, so
monitor reward and entropy instead. There is no length normalisation, as an action is a single decision.

In most groups all rewards are alike. By default, therefore, only the examples whose first few rewards differ most get
a whole group (``candidates``).

The gradient is unbiased with one candidate, no scaling, and as baseline either the mean of the *other* rewards in the
group or a learned one. The mean of the whole group shrinks the expected gradient to (G - 1) / G of the true one and
keeps its direction; dividing by the group's standard deviation changes the direction as well (Liu et al.,
"Understanding R1-Zero-like training: a critical perspective", 2025).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from agents.learning import Metrics, draw_counts, draw_readable, finite_rows, lowest_eighth
from agents.ordered_subset import OrderedSubset, as_subsets
from agents.pool import ExamplePool
from agents.scorer import Scorer
from agents.subset import KSubset
from agents.training.grpo_config import PRESETS, GRPOConfig, Objective
from agents.training.imitation import WarmedUp
from agents.training.objective import advantages, policy_objective, surrogate
from agents.training.options import check_batch
from agents.training.snapshot import Snapshot
from agents.training.value_baseline import ValueBaseline
from grip_env.common.finite import named_step
from grip_env.rewards.judging import RewardScorer
from grip_env.rewards.parsing import resolve_reward
from grip_env.rewards.terms import Reward
from grip_env.vlms.base import Encoded, FrozenVLM, Scores

__all__ = [
    "GRPO",
    "PRESETS",
    "RLOO",
    "GRPOConfig",
    "Metrics",
    "Objective",
    "Reinforce",
    "advantages",
    "policy_objective",
    "surrogate",
]


class Rollouts(NamedTuple):
    """Subsets drawn for one batch, and their rewards."""

    encoded: Encoded
    """B examples."""
    counts: torch.Tensor
    """Subset sizes, long (B,)."""
    policy: KSubset | OrderedSubset
    """Distribution over the subsets of the examples."""
    actions: torch.Tensor
    """Samples of the policy: subsets, bool (G, B, N), or orders, long (G, B, K)."""
    reward: torch.Tensor
    """Rewards, float (B, G)."""
    seen: dict[str, float]
    """Values to log, over all candidates."""
    seconds: float
    """Time spent on scoring."""
    skipped: int = 0
    """Number of examples left out because a score or reward was not finite."""


def _seen(scores: Scores, reward: torch.Tensor, counts: torch.Tensor, flat_below: float) -> dict[str, float]:
    """Return the values to log for scores and rewards, (B, G)."""
    small = lowest_eighth(counts)
    groups = {}
    if reward.shape[1] > 1:
        spread = reward.std(1)
        groups = {"group_std": float(spread.mean()), "flat_groups": float((spread < flat_below).float().mean())}
    return {
        "reward": float(reward.mean()),
        "reward_smallest_budgets": float(reward[small].mean()),
        "log_likelihood": float(scores.log_likelihood.mean()),
        "log_likelihood_smallest_budgets": float(scores.log_likelihood[small].mean()),
        "accuracy": float(scores.correct.float().mean()),
        **groups,
    }


class GRPO(WarmedUp):
    """GRPO training of a scorer against a frozen vision-language model.

    Args:
        vlm: The frozen model.
        pool: Training examples.
        scorer: The network to train, in place. Its own ``in_turn`` applies unless the config sets ``in_turn`` or a
            preset other than "default".
        config: Hyperparameters; in ``self.config``, the values that a preset decides are filled in.
        reward: A reward or a text that describes one; see :func:`~grip_env.rewards.parsing.resolve_reward`. All
            subsets of a group have the same size, so that :class:`~grip_env.rewards.terms.KeptFraction` changes the
            logged rewards but not the advantages.
        seed: Seed of budgets and subsets.

    Raises:
        ValueError: If a setting is invalid, or settings contradict each other.

    Each step logs, besides reward and accuracy: ``group_std``, the standard deviation of a group's rewards, averaged
    over groups, and ``flat_groups``, the share of groups where it is below ``flat_below`` (both absent if a group is
    one subset); ``entropy_per_token``, exact for the k-subset distribution; for tokens chosen one after another, it is
    the entropy of their order, which is higher, estimated from the samples; ``value_loss`` with a learned baseline;
    ``seconds`` of the step; ``forwards``, the forward-equivalents so far (:class:`~agents.pool.ForwardCounter`).
    """

    phase = "grpo"

    def __init__(
        self,
        vlm: FrozenVLM,
        pool: ExamplePool,
        scorer: Scorer,
        config: GRPOConfig,
        reward: str | Reward = "log_likelihood",
        seed: int = 0,
    ) -> None:
        in_turn = scorer.config.in_turn
        if config.in_turn is not None or config.preset != "default":
            scorer.check_in_turn(config.objective().in_turn)
        config = replace(config, in_turn=in_turn)
        self.config, self.settings = config.resolved(), config.objective()
        if in_turn and (self.settings.kl_weight or self.settings.entropy_weight):
            raise ValueError(
                f"got kl_weight={self.settings.kl_weight} and entropy_weight={self.settings.entropy_weight}, but KL "
                "and entropy are not known where tokens are chosen in turn: set both to 0, or choose all at once "
                "(in_turn=False, --grpo.no-in-turn)"
            )
        check_batch(config.instances, pool.size, self.settings.candidates)
        self.reward, self.seed = resolve_reward(reward), seed
        super().__init__(vlm, pool, scorer, config, self.reward, seed)
        self._reference: Scorer | None = None
        self._critic: ValueBaseline | None = None

    @property
    def rewards(self) -> RewardScorer:
        """The frozen model combined with the reward."""
        return RewardScorer(self.vlm, self.reward)

    @property
    def _first_token(self) -> bool:
        return self.rewards.agreement

    def _begin(self) -> None:
        if self._learner is not None:
            return
        super()._begin()
        config, device = self.config, next(self.scorer.parameters()).device
        if self.settings.kl_weight:
            self._reference = Scorer(self.scorer.config).to(device)
            self._reference.load_state_dict(self.scorer.state_dict())
            self._reference.eval().requires_grad_(False)
        if self.settings.baseline == "learned":
            options = (config.value_learning_rate, config.max_gradient_norm, config.steps, self.seed, device)
            self._critic = ValueBaseline(self.scorer.config, *options)

    def _parts(self) -> dict[str, Snapshot | None]:
        return super()._parts() | {
            "reference": None if self._reference is None else Snapshot.of_module(self._reference),
            "critic": None if self._critic is None else self._critic.snapshot(),
        }

    def restore(self, snapshot: Snapshot) -> None:
        """Continue where a snapshot was taken; see :class:`WarmedUp`."""
        super().restore(snapshot)
        if self._reference is not None:
            snapshot.part("reference").load_into(self._reference)
        if self._critic is not None:
            self._critic.restore(snapshot.part("critic"))

    def draw_counts(self, encoded: Encoded) -> torch.Tensor:
        """Draw a subset size for each example, long (B,); see :func:`~agents.learning.draw_counts`."""
        config = self.config
        return draw_counts(encoded, config.min_budget, config.max_budget, self._generator, config.budget_tilt)

    def _policy(self, scorer: Scorer, encoded: Encoded, counts: torch.Tensor) -> KSubset | OrderedSubset:
        return scorer.policy(encoded, counts, self.config.temperature)

    def _score(self, encoded: Encoded, full: Scores, actions: torch.Tensor) -> tuple[Scores, torch.Tensor, float]:
        """Return scores and rewards of the samples, (B, G), and the seconds spent on scoring."""
        subsets = as_subsets(actions, encoded.token_mask.shape[1]) if self.settings.in_turn else actions  # (G, B, N)
        started = time.perf_counter()
        scores = self.rewards.score(encoded, subsets.transpose(0, 1).contiguous(), full)
        seconds = time.perf_counter() - started
        self.pool.compute.add(scores.log_likelihood.numel())
        return scores, self.rewards.judge(scores, full, finite=False), seconds

    def _draw(self) -> Rollouts | None:
        """Draw examples, budgets and subsets.

        Of several candidates, the examples whose rewards differ most are kept. Returns ``None`` if no example has
        finite scores.
        """
        config, candidates = self.config, self.settings.candidates
        drawn = draw_readable(self.pool, config.instances * candidates, config.on_nan, self.rewards.agreement)
        encoded, full, unread = drawn
        if not len(encoded):
            return None
        counts = self.draw_counts(encoded)
        with torch.set_grad_enabled(candidates == 1):
            policy = self._policy(self.scorer, encoded, counts)
        first = config.probes if candidates > 1 else config.group
        actions = policy.sample(torch.Size((first,)), generator=self._generator)
        scores, reward, seconds = self._score(encoded, full, actions)
        good = self._good(encoded, scores, full, reward)
        skipped = len(encoded) - len(good)
        if skipped:
            if not len(good):
                return None
            encoded, full, counts, scores, reward = encoded[good], full[good], counts[good], scores[good], reward[good]
            actions = self._only(actions, good, counts)
            if candidates == 1:  # with several candidates, the policy is rebuilt below
                policy = self._policy(self.scorer, encoded, counts)
        seen = _seen(scores, reward, counts, config.flat_below)
        if candidates > 1:
            rows = reward.std(1).argsort(descending=True, stable=True)[: config.instances].sort().values
            encoded, full, counts = encoded[rows], full[rows], counts[rows]
            policy = self._policy(self.scorer, encoded, counts)
            more = policy.sample(torch.Size((config.group - first,)), generator=self._generator)
            scores, its, longer = self._score(encoded, full, more)
            actions = torch.cat([self._only(actions, rows, counts), more])
            reward = torch.cat([reward[rows], its], 1)
            seconds += longer
            good = self._good(encoded, scores, full, reward)
            if len(good) < len(encoded):
                if not len(good):
                    return None
                skipped += len(encoded) - len(good)
                encoded, counts, reward = encoded[good], counts[good], reward[good]
                actions = self._only(actions, good, counts)
                policy = self._policy(self.scorer, encoded, counts)
        return Rollouts(encoded, counts, policy, actions, reward, seen, seconds, skipped + unread)

    def _good(self, encoded: Encoded, scores: Scores, full: Scores, reward: torch.Tensor) -> torch.Tensor:
        """Return the rows whose scores and rewards are all finite, long."""
        known = torch.cat([scores.log_likelihood, full.log_likelihood, reward.to(scores.log_likelihood)], 1)
        return finite_rows(known, "the reward, or a log-likelihood,", encoded, self.config.on_nan).nonzero()[:, 0]

    def _only(self, actions: torch.Tensor, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Return the samples of some rows; orders are cut to the largest of ``counts``, (R,)."""
        return actions[:, rows, : int(counts.max())] if self.settings.in_turn else actions[:, rows]

    def _optimise(self) -> Iterator[Metrics]:
        config, settings, learner, critic = self.config, self.settings, self._learner, self._critic
        assert learner is not None
        self.scorer.train()
        for step in range(self._done, config.steps):
            learner.begin(step)
            started = time.perf_counter()
            with named_step(self.phase, step):
                drawn = self._draw()
            self._done = step + 1
            if drawn is None:
                continue
            encoded, counts, policy, actions, reward, seen, scoring, skipped = drawn
            value = None if critic is None else critic.predict(encoded, counts)
            advantage = advantages(reward, settings.scale, settings.std_floor, settings.baseline, value).T  # (G, B)
            counted = reward.std(1) >= config.flat_below if settings.drop_flat else None
            old: torch.Tensor | None = None
            for epoch in range(settings.epochs):
                if epoch:
                    policy = self._policy(self.scorer, encoded, counts)
                log_prob = policy.log_prob(actions)  # (G, B)
                old = log_prob.detach() if old is None else old
                reference = None
                if self._reference is not None:
                    with torch.no_grad():
                        reference = self._policy(self._reference, encoded, counts)
                objective = policy_objective(policy, log_prob, old, advantage, settings, counted, reference)
                with named_step(self.phase, step):
                    norm = learner.minimise(-objective)
            value_loss = {} if critic is None else {"value_loss": critic.learn(encoded, counts, reward, step)}
            with torch.no_grad():
                assert old is not None  # there is at least one epoch
                entropy = policy.entropy() if isinstance(policy, KSubset) else -old.mean(0)
            yield Metrics(
                self.phase,
                step,
                {
                    **seen,
                    **value_loss,
                    "entropy_per_token": float((entropy / counts).mean()),
                    "gradient_norm": norm,
                    **({"skipped": skipped} if config.on_nan == "skip" else {}),
                    "learning_rate": learner.learning_rate,
                    "seconds": time.perf_counter() - started,
                    "scoring_seconds": scoring,
                    "forwards": self.pool.compute.forwards,
                },
            )


class RLOO(GRPO):
    """GRPO with the preset "rloo", as an algorithm of its own.

    Sources: Kool, van Hoof & Welling, "Buy 4 REINFORCE samples, get a baseline for free!", ICLR 2019 workshop; Ahmadian
    et al., "Back to basics: revisiting REINFORCE-style optimization for learning from human feedback", ACL 2024.
    """

    phase = "rloo"


class Reinforce(GRPO):
    """GRPO with the preset "reinforce", as an algorithm of its own.

    Source: Williams, "Simple statistical gradient-following algorithms for connectionist reinforcement learning", 1992.
    """

    phase = "reinforce"
