"""Training utilities shared by all algorithms that train a scorer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from agents.pool import ExamplePool
from agents.training.options import OnNaN
from agents.training.snapshot import Snapshot
from grip_env.common.finite import NonFiniteError, name_of
from grip_env.envs.core.sampling import tokens_in_budget
from grip_env.vlms.base import Encoded, Scores

__all__ = ["Learner", "Metrics", "draw_counts", "draw_readable", "finite_rows", "lowest_eighth"]


@dataclass
class Metrics:
    """Metrics of one training step, for the progress bar, the log and TensorBoard."""

    phase: str
    step: int
    values: dict[str, float] = field(default_factory=dict)


class Learner:
    """AdamW with gradient clipping and an optional cosine decay of the learning rate.

    Args:
        network: The network to train, in place.
        learning_rate: Peak learning rate.
        max_gradient_norm: Norm to which gradients are clipped.
        decay_over: Number of steps over which the learning rate falls to 2% of its peak; 0 keeps it constant.

    Sources: Loshchilov & Hutter, "Decoupled weight decay regularization", ICLR 2019, and "SGDR: stochastic gradient
    descent with warm restarts", ICLR 2017 (the cosine).
    """

    def __init__(
        self, network: torch.nn.Module, learning_rate: float, max_gradient_norm: float, decay_over: int = 0
    ) -> None:
        self.network, self.peak = network, learning_rate
        self.max_gradient_norm, self.decay_over = max_gradient_norm, decay_over
        self.learning_rate = learning_rate
        """The learning rate of the next step."""
        self._optimizer = torch.optim.AdamW(
            network.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01
        )

    def snapshot(self) -> Snapshot:
        """Return the state of the optimiser; the network is not in it."""
        return Snapshot.of_optimizer(self._optimizer)

    def restore(self, snapshot: Snapshot) -> None:
        """Continue where :meth:`snapshot` was taken, with the network as it was then."""
        snapshot.load_into_optimizer(self._optimizer)

    def begin(self, step: int) -> None:
        """Set the learning rate of a step, counted from 0."""
        if self.decay_over:
            self.learning_rate = self.peak * (0.51 + 0.49 * math.cos(math.pi * step / self.decay_over))
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate

    def minimise(self, loss: torch.Tensor) -> float:
        """Take one gradient step on a scalar loss and return the gradient's norm before clipping.

        Raises:
            NonFiniteError: If the loss or the gradient is NaN or infinite; no step is then taken.
        """
        self._optimizer.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.max_gradient_norm))
        if not math.isfinite(norm) or not bool(loss.detach().isfinite()):
            self._optimizer.zero_grad()
            raise NonFiniteError(
                f"the loss is {float(loss.detach()):g} and its gradient's norm {norm:g}: try a learning rate "
                f"below {self.learning_rate:g}"
            )
        self._optimizer.step()
        return norm


def finite_rows(values: torch.Tensor, what: str, encoded: Encoded, on_nan: OnNaN) -> torch.Tensor:
    """Return which rows of ``values`` are finite, bool (B,).

    Args:
        values: float (B, ...), one row for each example.
        what: Description of the values, for the message.
        encoded: The B examples.
        on_nan: "skip" returns the mask, so that the caller can leave out the other rows; "stop" raises an error.

    Raises:
        NonFiniteError: With "stop", if a row is not finite; the message names the first such example.
    """
    good = values.detach().flatten(1).isfinite().all(1)
    if on_nan == "stop" and not bool(good.all()):
        first = encoded.examples[int((~good).nonzero()[0])]
        raise NonFiniteError(
            f"{what} of {name_of(first)} is NaN or infinite: check the model and the reward, or leave such examples "
            "out with on_nan='skip' (--ALGORITHM.on-nan skip)"
        )
    return good


def draw_readable(
    pool: ExamplePool, count: int, on_nan: OnNaN, first_token: bool = False
) -> tuple[Encoded, Scores, int]:
    """Draw examples whose encoded images and questions are finite.

    Args:
        pool: The training examples.
        count: Number of examples to draw.
        on_nan: See :func:`finite_rows`.
        first_token: See :meth:`~agents.pool.ExamplePool.batch`.

    Returns:
        At most ``count`` examples, their scores with all tokens kept, and the number of examples left out.

    Raises:
        NonFiniteError: With "stop", if an example is not finite; the message names it.
    """
    encoded, full = pool.batch(count, first_token)
    good = finite_rows(encoded.tokens, "a visual token", encoded, on_nan)
    good = good & finite_rows(encoded.question, "an embedding of the question", encoded, on_nan)
    rows = good.nonzero()[:, 0]
    if len(rows) < len(encoded):
        encoded, full = encoded[rows], full[rows]
    return encoded, full, count - len(encoded)


def draw_counts(
    encoded: Encoded, low: float, high: float, generator: torch.Generator, tilt: float = 1.0
) -> torch.Tensor:
    """Draw a subset size for each example, log-uniform over the budgets.

    The draws are stratified: they are spread evenly over the batch.

    Args:
        encoded: B examples.
        low: Smallest share of the tokens, in (0, 1].
        high: Largest share.
        generator: Source of randomness, on the CPU.
        tilt: Values above 1 draw small budgets more often: low * (high / low) ** (u ** tilt), u uniform in [0, 1).

    Returns:
        long (B,), on the examples' device.
    """
    count = len(encoded)
    bottom, top = math.log(low), math.log(high)
    place = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
    budget = (bottom + (top - bottom) * (place / count) ** tilt).exp()
    pairs = zip(budget.tolist(), encoded.token_mask.sum(1).tolist(), strict=True)
    return torch.tensor([tokens_in_budget(*pair) for pair in pairs], device=encoded.tokens.device)


def lowest_eighth(counts: torch.Tensor) -> torch.Tensor:
    """Return which subset sizes are in the lowest eighth, bool (B,).

    The log reports these examples separately.

    Args:
        counts: Subset sizes, long (B,).
    """
    return counts <= counts.float().quantile(0.125)
