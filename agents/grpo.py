"""Group-relative policy optimisation over subsets of visual tokens, and its relatives RLOO and REINFORCE.

How it departs from GRPO as Shao et al. (DeepSeekMath, 2024) have it for language: an action is one subset, which has
one log-probability and no per-token ratio. By default its tokens are drawn one after another
(:mod:`agents.ordered_subset`), otherwise all at once from the exact k-subset distribution, whose KL to the policy that
the warm-up left is exact, not estimated. Rewards are continuous, so that the group's standard deviation has a floor;
one on-policy update per batch is the default, which makes the ratio 1, so that the surrogate's value is 0 (its
gradient is not: watch reward and entropy). A single decision has no length to normalise by.

By default only the examples whose first few rewards differ most get a whole group (``candidates``), as in most groups
all rewards are alike.

What an unbiased gradient needs: one candidate, no scaling, and as baseline either the mean of the *others* in the group
or a learned one. The group's own mean shrinks the expected gradient to (G - 1) / G of the true one, in its direction;
dividing by the group's standard deviation changes the direction as well (Liu et al., "Understanding R1-Zero-like
training: a critical perspective", 2025).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from agents.learning import Learner, Metrics, draw_counts, finite_rows, lowest_eighth
from agents.ordered_subset import OrderedSubset, as_subsets
from agents.pool import ExamplePool
from agents.scorer import Scorer
from agents.subset import KSubset
from agents.training.grpo_config import PRESETS, GRPOConfig, Objective
from agents.training.imitation import Imitation, as_warm_up
from agents.training.options import check_batch
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


def advantages(
    rewards: torch.Tensor,
    scale: str = "group",
    floor: float = 0.1,
    baseline: str = "group_mean",
    value: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return how much better each subset did than its baseline, (B, G).

    Args:
        rewards: float (B, G).
        scale: Divide by the root mean square of the differences in the "group" or in the whole "batch", or by nothing
            ("none"). With the group's mean as baseline, the former is the group's standard deviation. TRL's "group"
            has Bessel's correction (G - 1), and its "batch" is the deviation of raw rewards, not of differences.
        floor: Added to that root mean square.
        baseline: "group_mean" of all G rewards; "leave_one_out", the mean of the other G - 1, which is G / (G - 1)
            times as far away; "learned".
        value: The learned baseline, float (B,); for the others ``None``.

    Raises:
        ValueError: If there is no such scale or baseline.

    >>> advantages(torch.tensor([[1.0, 3.0]]), "none")
    tensor([[-1.,  1.]])
    >>> advantages(torch.tensor([[1.0, 3.0]]), "none", baseline="leave_one_out")
    tensor([[-2.,  2.]])
    """
    if (baseline == "learned") != (value is not None):
        raise ValueError(f"the learned baseline has a value, and no other; got baseline={baseline!r}, value={value}")
    if value is not None:
        centred = rewards - value[:, None]
    else:
        centred = rewards - rewards.mean(1, keepdim=True)
        if baseline == "leave_one_out":
            centred = centred * (rewards.shape[1] / (rewards.shape[1] - 1))
        elif baseline != "group_mean":
            raise ValueError(f"unknown baseline {baseline!r}: choose group_mean, leave_one_out or learned")
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
    """Return the clipped surrogate objective of each subset (to be maximised), same shape as the inputs.

    Source: Schulman et al., "Proximal policy optimization algorithms", 2017; bounds apart: Yu et al. (DAPO), 2025.
    """
    ratio = (log_prob - old).exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)


def policy_objective(
    policy: KSubset | OrderedSubset,
    log_prob: torch.Tensor,
    old: torch.Tensor,
    advantage: torch.Tensor,
    settings: Objective,
    counted: torch.Tensor | None = None,
    reference: KSubset | OrderedSubset | None = None,
) -> torch.Tensor:
    """Return what one update maximises, a scalar: mean surrogate - KL to the reference + entropy per kept token.

    The last two are for the k-subset law, and left out for tokens chosen in turn, where neither is known.

    Args:
        policy: Over the subsets of B examples.
        log_prob: The policy's log-probabilities of the subsets drawn, (G, B).
        old: The same when they were drawn, (G, B).
        advantage: (G, B).
        settings: Clipping and weights.
        counted: Which examples' groups teach anything, bool (B,); all by default. KL and entropy are over all.
        reference: What the KL is to; needed where it has a weight.
    """
    each = surrogate(log_prob, old, advantage, settings.clip_low, settings.clip_high)
    # where no group is left, 0 with a gradient of 0, so that KL and entropy still act
    result = each.mean() if counted is None else (each * counted).sum() / (len(each) * counted.sum()).clamp_min(1)
    if settings.kl_weight and isinstance(policy, KSubset) and isinstance(reference, KSubset):
        result = result - settings.kl_weight * torch.distributions.kl_divergence(policy, reference).mean()
    if settings.entropy_weight and isinstance(policy, KSubset):
        result = result + settings.entropy_weight * (policy.entropy() / policy.k).mean()
    return result


class Rollouts(NamedTuple):
    """What one batch drew, and what it is worth."""

    encoded: Encoded
    """B examples."""
    counts: torch.Tensor
    """Subset sizes, long (B,)."""
    policy: KSubset | OrderedSubset
    """Over the subsets of the examples."""
    actions: torch.Tensor
    """What the policy drew: subsets, bool (G, B, N), or orders, long (G, B, K)."""
    reward: torch.Tensor
    """float (B, G)."""
    seen: dict[str, float]
    """For the log, of all candidates."""
    seconds: float
    """Spent on scoring."""
    skipped: int = 0
    """Examples that were left out, as a score or reward was not finite."""


def _seen(scores: Scores, reward: torch.Tensor, counts: torch.Tensor, flat_below: float) -> dict[str, float]:
    """Return what the log says of rewards, (B, G)."""
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


class GRPO:
    """Trains a scorer against a frozen vision-language model.

    Args:
        vlm: The frozen model.
        pool: Training examples.
        scorer: What is trained, in place. Where neither ``in_turn`` nor a preset other than "default" is given, it is
            trained to choose as it was made to.
        config: Hyperparameters; ``self.config`` has those that a preset decides filled in.
        reward: A reward, or a text that stands for one: see :func:`~grip_env.rewards.parsing.resolve_reward`. All
            subsets of a group have one size, so that :class:`~grip_env.rewards.terms.KeptFraction` changes nothing but
            numbers.
        seed: Decides budgets and subsets.

    Raises:
        ValueError: If a setting is impossible, or settings contradict each other.

    Logged at every step, beside reward and accuracy: ``group_std``, the mean over groups of their rewards' standard
    deviation, and ``flat_groups``, the share of groups where it is below ``flat_below`` (both absent where a group is
    one subset); ``entropy_per_token``, exact for the k-subset law, and for tokens chosen in turn that of their order,
    estimated from what was drawn, which is higher; ``value_loss`` with a learned baseline; ``seconds`` of the step, and
    ``forwards``, what the language model was run for from the beginning on: see :class:`~agents.pool.ForwardCounter`.
    """

    phase = "grpo"
    """What the steps with rewards are called in :class:`~agents.learning.Metrics`; those before are "warmup"."""

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
        self.vlm, self.pool, self.scorer, self.seed = vlm, pool, scorer, seed
        self.reward = resolve_reward(reward)
        self._warm_up = Imitation(vlm, pool, scorer, as_warm_up(config), self.reward, seed)
        self._generator = self._warm_up.generator
        self._reference: Scorer | None = None

    @property
    def rewards(self) -> RewardScorer:
        """The frozen model and what its scores are worth."""
        return RewardScorer(self.vlm, self.reward)

    def train(self) -> Iterator[Metrics]:
        """Run warm-up and policy optimisation, yielding after every step; the scorer is usable at any point."""
        yield from self._warm_up.imitate("warmup", self.rewards.agreement)
        if self.settings.kl_weight:
            self._reference = Scorer(self.scorer.config).to(next(self.scorer.parameters()).device)
            self._reference.load_state_dict(self.scorer.state_dict())
            self._reference.eval().requires_grad_(False)
        yield from self._optimise()

    def draw_counts(self, encoded: Encoded) -> torch.Tensor:
        """Draw a subset size for each example, long (B,); see :func:`~agents.learning.draw_counts`."""
        config = self.config
        return draw_counts(encoded, config.min_budget, config.max_budget, self._generator, config.budget_tilt)

    def _policy(self, scorer: Scorer, encoded: Encoded, counts: torch.Tensor) -> KSubset | OrderedSubset:
        return scorer.policy(encoded, counts, self.config.temperature)

    def _score(self, encoded: Encoded, full: Scores, actions: torch.Tensor) -> tuple[Scores, torch.Tensor, float]:
        """Return scores and rewards, (B, G), of what was drawn, and the seconds that scoring took."""
        subsets = as_subsets(actions, encoded.token_mask.shape[1]) if self.settings.in_turn else actions  # (G, B, N)
        started = time.perf_counter()
        scores = self.rewards.score(encoded, subsets.transpose(0, 1).contiguous(), full)
        seconds = time.perf_counter() - started
        self.pool.compute.add(scores.log_likelihood.numel())
        return scores, self.rewards.judge(scores, full, finite=False), seconds

    def _draw(self) -> Rollouts | None:
        """Draw examples, budgets and subsets; of several candidates, keep the examples whose rewards differ most.

        Returns ``None`` where no example is left, as none has finite scores.
        """
        config, candidates = self.config, self.settings.candidates
        encoded, full = self.pool.batch(config.instances * candidates, self.rewards.agreement)
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
            if candidates == 1:  # of several, the policy is made anew below
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
        return Rollouts(encoded, counts, policy, actions, reward, seen, seconds, skipped)

    def _good(self, encoded: Encoded, scores: Scores, full: Scores, reward: torch.Tensor) -> torch.Tensor:
        """Return the rows whose scores and rewards are all finite, long."""
        known = torch.cat([scores.log_likelihood, full.log_likelihood, reward.to(scores.log_likelihood)], 1)
        return finite_rows(known, "the reward, or a log-likelihood,", encoded, self.config.on_nan).nonzero()[:, 0]

    def _only(self, actions: torch.Tensor, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Return what was drawn for some rows, which keep ``counts`` tokens, long (R,): orders end with the longest."""
        return actions[:, rows, : int(counts.max())] if self.settings.in_turn else actions[:, rows]

    def _optimise(self) -> Iterator[Metrics]:
        config, settings = self.config, self.settings
        learner = Learner(self.scorer, config.learning_rate, config.max_gradient_norm, config.steps)
        critic = None
        if settings.baseline == "learned":
            device = next(self.scorer.parameters()).device
            options = (config.value_learning_rate, config.max_gradient_norm, config.steps, self.seed, device)
            critic = ValueBaseline(self.scorer.config, *options)
        self.scorer.train()
        for step in range(config.steps):
            learner.begin(step)
            started = time.perf_counter()
            with named_step(self.phase, step):
                drawn = self._draw()
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
                assert old is not None  # there is one epoch at least
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
    """GRPO with the preset "rloo", under a name of its own.

    Sources: Kool, van Hoof & Welling, "Buy 4 REINFORCE samples, get a baseline for free!", ICLR 2019 workshop; Ahmadian
    et al., "Back to basics: revisiting REINFORCE-style optimization for learning from human feedback", ACL 2024.
    """

    phase = "rloo"


class Reinforce(GRPO):
    """GRPO with the preset "reinforce", under a name of its own.

    Source: Williams, "Simple statistical gradient-following algorithms for connectionist reinforcement learning", 1992.
    """

    phase = "reinforce"
