"""Detection of NaN and infinite numbers in training, with errors that name their origin."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

__all__ = ["NonFiniteError", "check_finite", "name_of", "named_step"]


class NonFiniteError(ValueError):
    """Error for a loss, gradient, score, reward or weight that is NaN or infinite."""


def check_finite(weights: Mapping[str, torch.Tensor], owner: str) -> None:
    """Raise NonFiniteError unless every number in ``weights`` is finite.

    The message names the first tensor that is not.

    Args:
        weights: Tensors by name, of any shape and dtype.
        owner: Owner of the tensors, for the message.
    """
    for name, value in weights.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise NonFiniteError(f"{owner} has NaN or infinite numbers in {name}")


class Asked(Protocol):
    """The part of an :class:`~grip_env.tasks.base.Example` that messages need."""

    @property
    def key(self) -> str:
        """Name of the example; may be empty."""
        ...

    @property
    def question(self) -> str:
        """The question."""
        ...


def name_of(example: Asked) -> str:
    """Return the name of an example in messages: its key, or its question if it has no key."""
    return f"example {example.key!r}" if example.key else f"the example with the question {example.question[:80]!r}"


@contextlib.contextmanager
def named_step(phase: str, step: int) -> Iterator[None]:
    """Add phase and step, counted from 0, to every NonFiniteError raised in the context."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"{phase} step {step}: {error}") from error
