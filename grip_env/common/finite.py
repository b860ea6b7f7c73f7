"""Numbers that training cannot go on from: NaN and infinities, named where they occur."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

__all__ = ["NonFiniteError", "check_finite", "name_of", "named_step"]


class NonFiniteError(ValueError):
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


class Asked(Protocol):
    """What is needed of an :class:`~grip_env.tasks.base.Example`."""

    @property
    def key(self) -> str:
        """Where it comes from; may be empty."""
        ...

    @property
    def question(self) -> str:
        """What is asked."""
        ...


def name_of(example: Asked) -> str:
    """Return what an example is called in messages: its key, or its question where it has none."""
    return f"example {example.key!r}" if example.key else f"the example with the question {example.question[:80]!r}"


@contextlib.contextmanager
def named_step(phase: str, step: int) -> Iterator[None]:
    """Name the step, counted from 0, in every NonFiniteError that is raised in the context."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"{phase} step {step}: {error}") from error
