"""Subsets of a task that are tasks themselves."""

from __future__ import annotations

from collections.abc import Sequence

from grip_env.tasks.base import Example, Task, check_index

__all__ = ["TaskSubset"]


class TaskSubset:
    """Selected examples of one split of a task, in the given order.

    Args:
        task: The task.
        split: The only split of the subset.
        indices: Indices of the examples in that split.

    >>> from grip_env.tasks.scenes import SceneTask
    >>> part = TaskSubset(SceneTask(), "train", [4, 2])
    >>> part.size("train"), part.example("train", 1).key
    (2, 'scenes/train/2')
    """

    def __init__(self, task: Task, split: str, indices: Sequence[int]) -> None:
        self.task, self.indices = task, [int(index) for index in indices]
        self.name, self.splits = task.name, (split,)

    def size(self, split: str) -> int:
        """Return the number of examples.

        Raises:
            ValueError: If ``split`` is another split.
        """
        if split not in self.splits:
            raise ValueError(f"this part of task {self.name!r} is of split {self.splits[0]!r}; got {split!r}")
        return len(self.indices)

    def example(self, split: str, index: int) -> Example:
        """Return example ``index`` of the subset."""
        check_index(self, split, index)
        return self.task.example(split, self.indices[index])
