"""Numbers that training cannot go on from: NaN and infinities, named where they occur."""

from __future__ import annotations

from collections.abc import Mapping

import torch

__all__ = ["NonFiniteError", "check_finite"]


class NonFiniteError(ArithmeticError):
    """A loss, gradient, score, reward or weight is NaN or infinite."""


def check_finite(weights: Mapping[str, torch.Tensor], owner: str) -> None:
    """Raise NonFiniteError, naming the first tensor, unless every number in ``weights`` is finite.

    Args:
        weights: Tensors by name, of any shape and dtype.
        owner: What they belong to, for the message.
    """
    for name, value in weights.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise NonFiniteError(f"{owner} has NaN or infinite numbers in {name}")
