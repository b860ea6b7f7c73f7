"""TensorBoard: curves and pictures of a training. Its background thread can neither hang a program nor talk into it."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

__all__ = ["Board"]

PATIENCE = 3.0
"""Seconds that closing may take: on a full or vanished disk the writer might wait for ever."""


class Board:
    """Writes an event file for TensorBoard into a folder, as a context.

    Args:
        folder: Where.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))
        self._hook = threading.excepthook
        threading.excepthook = self._report

    def _report(self, failure: Any) -> None:
        """Keep quiet about the writer's thread: its error comes again in the thread that writes."""
        if type(failure.thread).__name__ != "_AsyncWriterThread":
            self._hook(failure)

    def scalar(self, name: str, value: float, step: int) -> None:
        """Add a point to a curve."""
        self._writer.add_scalar(name, value, step)

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Add a picture, uint8 (height, width, 3)."""
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        def close() -> None:
            with contextlib.suppress(Exception):
                self._writer.close()

        closing = threading.Thread(target=close, daemon=True)
        closing.start()
        closing.join(PATIENCE)
        threading.excepthook = self._hook
