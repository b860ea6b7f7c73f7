"""The interface of tasks, and their examples, which are deterministic in (split, index)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

__all__ = ["Example", "Task", "check_index"]


@dataclass(frozen=True)
class Example:
    """One question about one image.

    Attributes:
        image: RGB picture, uint8, shape (height, width, 3).
        question: The question, without any prompt around it.
        answer: The expected answer, without leading or trailing white space.
        family: Kind of question ("colour", "counting", ...); results are reported per family.
        relevance: Relevance to the answer of each cell of a (rows, columns) grid laid over the image: float32 in
            [0, 1], 0 for irrelevant cells. When the budget is smaller than the set of relevant cells, larger values
            should be kept first. ``None`` where there is no ground truth.
        key: Name of the example for logs, unique within its task.
    """

    image: np.ndarray
    question: str
    answer: str
    family: str = "question"
    relevance: np.ndarray | None = None
    key: str = ""

    def token_relevance(self, positions: np.ndarray) -> np.ndarray | None:
        """Read the relevance grid at visual tokens.

        Args:
            positions: (N, 2) row and column of each token's centre in the image, each in [0, 1].

        Returns:
            float32 (N,), or ``None`` where the example has no ground truth.
        """
        if self.relevance is None:
            return None
        rows, columns = self.relevance.shape
        row = np.clip((positions[:, 0] * rows).astype(int), 0, rows - 1)
        column = np.clip((positions[:, 1] * columns).astype(int), 0, columns - 1)
        return self.relevance[row, column].astype(np.float32)


@runtime_checkable
class Task(Protocol):
    """A source of examples.

    ``example(split, index)`` always returns the same example for the same arguments, and splits share no
    examples.
    """

    @property
    def name(self) -> str:
        """Short name, used in logs and file names."""
        ...

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, such as ("train", "validation", "test")."""
        ...

    def size(self, split: str) -> int:
        """Return the number of examples in ``split``."""
        ...

    def example(self, split: str, index: int) -> Example:
        """Return example ``index`` of ``split``, 0 <= index < size(split)."""
        ...


def check_index(task: Task, split: str, index: int) -> None:
    """Raise ValueError or IndexError unless ``task`` has example ``index`` of ``split``."""
    if split not in task.splits:
        raise ValueError(f"unknown split {split!r} of task {task.name!r}: choose one of {', '.join(task.splits)}")
    size = task.size(split)
    if size == 0:
        raise ValueError(f"split {split!r} of task {task.name!r} has no examples: add some, or choose another split")
    if not 0 <= index < size:
        raise IndexError(f"example {index} of split {split!r} does not exist: choose 0 to {size - 1}")
