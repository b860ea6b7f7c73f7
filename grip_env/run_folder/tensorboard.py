"""Curves and pictures for TensorBoard.

The background thread of the writer can neither hang the program nor print errors of its own.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

__all__ = ["Board"]

PATIENCE = 3.0
"""Longest time to flush or close the writer, in seconds; on a full or vanished disk it might never finish."""


class Board:
    """A context manager that writes an event file for TensorBoard.

    Args:
        folder: The folder of the event file.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))
        self._hook = threading.excepthook
        threading.excepthook = self._report

    def _report(self, failure: Any) -> None:
        """Ignore errors of the writer's thread, which are raised again in the calling thread."""
        if type(failure.thread).__name__ != "_AsyncWriterThread":
            self._hook(failure)

    def scalar(self, name: str, value: float, step: int) -> None:
        """Add a point to a curve."""
        self._writer.add_scalar(name, value, step)

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Add a picture, uint8 (height, width, 3)."""
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def flush(self) -> None:
        """Write to disk all that was added."""
        _at_most_patience(self._writer.flush)

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _at_most_patience(self._writer.close)
        threading.excepthook = self._hook


def _at_most_patience(work: Callable[[], object]) -> None:
    """Wait for the writer's work, but not for ever, and ignore its errors.

    A lost curve is no reason to lose a training.
    """

    def quietly() -> None:
        with contextlib.suppress(Exception):
            work()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    thread.join(PATIENCE)
