"""Sources of examples: images with questions and answers."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grip_env.tasks.base import Task

__all__ = ["SCENES", "load_task"]

SCENES = {"scenes": "standard", "scenes-hard": "hard"}
"""Levels of the procedural scenes by the name of their task."""


def load_task(task: Task | str | PathLike[str]) -> Task:
    """Return a task by its name or by the path of its data; return task objects unchanged.

    Raises:
        ValueError: If there is no such task, or the data have faults (:class:`~grip_env.tasks.files.DataError`).
    """
    if not isinstance(task, str | PathLike):
        return task
    if isinstance(task, str) and task in SCENES:
        from grip_env.tasks.scenes import SceneTask

        return SceneTask(level=SCENES[task])
    if isinstance(task, str) and not Path(task).suffix and not Path(task).exists():
        raise ValueError(
            f"unknown task {task!r}: use {' or '.join(map(repr, SCENES))}, the path of your data, or pass an object "
            "that implements Task"
        )
    from grip_env.tasks.files import FileTask

    return FileTask(task)
