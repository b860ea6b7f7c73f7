"""What every algorithm that trains a scorer does alike: draws budgets, takes a gradient step, says what it did."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch

from grip_env.common.finite import NonFiniteError, name_of
from grip_env.envs.core.sampling import tokens_in_budget
from grip_env.vlms.base import Encoded

__all__ = [
    "Learner",
    "Metrics",
    "OnNaN",
    "check_batch",
    "check_budgets",
    "check_numbers",
    "check_on_nan",
    "draw_counts",
    "finite_rows",
    "lowest_eighth",
]

OnNaN: TypeAlias = Literal["stop", "skip"]
"""What becomes of examples whose scores, rewards or gradients are NaN or infinite."""


@dataclass
class Metrics:
    """What one step did, for the progress bar, the log and TensorBoard."""

    phase: str
    step: int
    values: dict[str, float] = field(default_factory=dict)


class Learner:
    """AdamW on a network, with clipped gradients and a learning rate that may decay along a cosine.

    Args:
        network: What is trained, in place.
        learning_rate: Peak learning rate.
        max_gradient_norm: Gradients are clipped to this norm.
        decay_over: Steps over which the learning rate falls to 2% of its peak; 0 leaves it there.

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

    def begin(self, step: int) -> None:
        """Set the learning rate of a step, counted from 0."""
        if self.decay_over:
            self.learning_rate = self.peak * (0.51 + 0.49 * math.cos(math.pi * step / self.decay_over))
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate

    def minimise(self, loss: torch.Tensor) -> float:
        """Take one step down the gradient of ``loss``, a scalar; returns the gradient's norm before clipping.

        Raises:
            NonFiniteError: If the loss or the gradient is NaN or infinite; no step is taken then.
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
        values: float (B, ...), a row for each example.
        what: What they are, for the message.
        encoded: The B examples.
        on_nan: "skip" leaves it to the caller to go on without the others; "stop" raises.

    Raises:
        NonFiniteError: With "stop", if a row is not finite; names the first such example.
    """
    good = values.detach().flatten(1).isfinite().all(1)
    if on_nan == "stop" and not bool(good.all()):
        first = encoded.examples[int((~good).nonzero()[0])]
        raise NonFiniteError(
            f"{what} of {name_of(first)} is NaN or infinite: check the model and the reward, or leave such examples "
            "out with on_nan='skip' (--ALGORITHM.on-nan skip)"
        )
    return good


def draw_counts(
    encoded: Encoded, low: float, high: float, generator: torch.Generator, tilt: float = 1.0
) -> torch.Tensor:
    """Draw a subset size for each example: log-uniform over the budgets, spread evenly in the batch.

    Args:
        encoded: B examples.
        low: Smallest share of the tokens, in (0, 1].
        high: Largest share.
        generator: Source of randomness, on the CPU.
        tilt: Above 1 draws small budgets more often: low * (high / low) ** (u ** tilt), u uniform in [0, 1).

    Returns:
        long (B,), on the examples' device.
    """
    count = len(encoded)
    bottom, top = math.log(low), math.log(high)
    place = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
    budget = (bottom + (top - bottom) * (place / count) ** tilt).exp()
    pairs = zip(budget.tolist(), encoded.token_mask.sum(1).tolist(), strict=True)
    return torch.tensor([tokens_in_budget(*pair) for pair in pairs], device=encoded.tokens.device)


def lowest_eighth(kept: torch.Tensor) -> torch.Tensor:
    """Return which subset sizes, long (B,), are among the lowest eighth, bool (B,): the log tells of them apart."""
    return kept <= kept.float().quantile(0.125)


def check_budgets(low: float, high: float, tilt: float = 1.0) -> None:
    """Raise ValueError unless two numbers are a range of shares of the tokens, and the tilt is above 0."""
    if not 0 < low <= high <= 1:
        raise ValueError(f"budgets must satisfy 0 < min_budget <= max_budget <= 1; got {low}, {high}")
    if not 0 < tilt < math.inf:
        raise ValueError(f"budget_tilt must be above 0; got {tilt}")


def check_numbers(
    options: object,
    at_least: Mapping[str, int],
    above_0: Sequence[str],
    not_negative: Sequence[str] = (),
    finite: Sequence[str] = (),
) -> None:
    """Raise ValueError, naming the option, unless all options of an algorithm that are listed are finite and in range.

    Args:
        options: Has the options as attributes.
        at_least: The least value allowed, by name.
        above_0: Names of those that must be above 0.
        not_negative: Names of those that may be 0.
        finite: Names of those that may have either sign.
    """
    for name, least in at_least.items():
        if not least <= getattr(options, name) < math.inf:
            raise ValueError(f"{name} must be at least {least}; got {getattr(options, name)}")
    for name in above_0:
        if not 0 < getattr(options, name) < math.inf:
            raise ValueError(f"{name} must be above 0; got {getattr(options, name)}")
    for name in not_negative:
        if not 0 <= getattr(options, name) < math.inf:
            raise ValueError(f"{name} must not be negative; got {getattr(options, name)}")
    for name in finite:
        if not math.isfinite(getattr(options, name)):
            raise ValueError(f"{name} must be finite; got {getattr(options, name)}")


def check_on_nan(on_nan: str) -> None:
    """Raise ValueError unless it is one of :data:`OnNaN`."""
    if on_nan not in ("stop", "skip"):
        raise ValueError(f"on_nan must be 'stop' or 'skip'; got {on_nan!r}")


def check_batch(instances: int, pool: int, candidates: int = 1) -> None:
    """Raise ValueError unless a pool of this size has as many examples as a step needs: candidates for each."""
    if instances * candidates > pool:
        each = f" of {candidates} candidates each" if candidates > 1 else ""
        raise ValueError(
            f"a step needs as many examples as the pool holds, at most; got instances={instances}{each} and "
            f"pool={pool}: choose a larger pool"
        )
