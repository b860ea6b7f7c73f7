"""A learned baseline: a network that predicts the reward of an example at a budget."""

from __future__ import annotations

import dataclasses

import torch

from agents.learning import Learner
from agents.scorer import Scorer, ScorerConfig
from agents.training.snapshot import Snapshot
from grip_env.vlms.base import Encoded

__all__ = ["ValueBaseline"]


class ValueBaseline:
    """Network that predicts the mean reward of the subsets drawn for an example at a budget.

    A scorer of one block reads the example, and the mean of its outputs over the visual tokens is the prediction
    (Zaheer et al., "Deep sets", NeurIPS 2017).

    Args:
        config: Sizes of the policy's scorer; its number of blocks is not used.
        learning_rate: Peak learning rate.
        max_gradient_norm: Gradients are clipped to this norm.
        decay_over: Steps over which the learning rate falls to 2% of its peak.
        seed: Seed of the weights.
        device: Device of the network.

    A prediction made before the update on a step's subsets does not depend on them. Subtracting it therefore leaves
    policy gradients unbiased, however bad it is. Source: Williams, "Simple statistical gradient-following
    algorithms for connectionist reinforcement learning", Machine Learning 8, 1992.
    """

    def __init__(
        self,
        config: ScorerConfig,
        learning_rate: float,
        max_gradient_norm: float,
        decay_over: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        with torch.random.fork_rng(devices=[]):  # keeps the run's random numbers as without a baseline
            torch.manual_seed(seed)
            self.network = Scorer(dataclasses.replace(config, blocks=1, in_turn=False)).to(device)
        self._learner = Learner(self.network, learning_rate, max_gradient_norm, decay_over)

    def snapshot(self) -> Snapshot:
        """Return the weights and the state of the optimiser."""
        return Snapshot.join({"network": Snapshot.of_module(self.network), "learner": self._learner.snapshot()})

    def restore(self, snapshot: Snapshot) -> None:
        """Continue where :meth:`snapshot` was taken."""
        snapshot.part("network").load_into(self.network)
        self._learner.restore(snapshot.part("learner"))

    def _values(self, encoded: Encoded, counts: torch.Tensor) -> torch.Tensor:
        return self.network.score(encoded, counts).sum(1) / encoded.token_mask.sum(1)  # padding scores 0

    @torch.no_grad()
    def predict(self, encoded: Encoded, counts: torch.Tensor) -> torch.Tensor:
        """Return the predicted reward, float (B,), of subsets of size ``counts``, long (B,)."""
        return self._values(encoded, counts)

    def learn(self, encoded: Encoded, counts: torch.Tensor, rewards: torch.Tensor, step: int) -> float:
        """Take one step towards the rewards (B, G) and return the mean squared error before it."""
        self._learner.begin(step)
        loss = (self._values(encoded, counts)[:, None] - rewards).square().mean()
        self._learner.minimise(loss)
        return float(loss.detach())
