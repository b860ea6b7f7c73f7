"""A window that shows the pictures of an environment, one after the other."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["Window"]


class Window:
    """Opens with the first picture; with a backend that draws to memory, nothing is seen.

    Args:
        title: Its name.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._figure: Any = None

    def show(self, picture: np.ndarray) -> None:
        """Show a picture, uint8 (height, width, 3), in place of the last one."""
        from matplotlib import pyplot

        if self._figure is None or not pyplot.fignum_exists(self._figure.number):
            height, width = picture.shape[:2]
            self._figure = pyplot.figure(self._title, figsize=(width / 100, height / 100), dpi=100)
        self._figure.clear()
        axes = self._figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.imshow(picture)
        canvas = self._figure.canvas
        canvas.draw()
        if canvas.required_interactive_framework is not None:  # a backend that draws to memory has no window to raise
            self._figure.show()
            canvas.flush_events()

    def close(self) -> None:
        """Close it, if it is open."""
        if self._figure is not None:
            from matplotlib import pyplot

            pyplot.close(self._figure)
            self._figure = None
