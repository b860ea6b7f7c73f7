"""Sources of examples: images with questions and answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grip_env.tasks.base import Task

__all__ = ["load_task"]


def load_task(task: Task | str) -> Task:
    """Return the task of that name, or ``task`` itself if it is none.

    Raises:
        ValueError: If there is no task of that name.
    """
    if not isinstance(task, str):
        return task
    if task != "scenes":
        raise ValueError(f"unknown task {task!r}: use 'scenes', or pass an object that implements Task")
    from grip_env.tasks.scenes import SceneTask

    return SceneTask()
