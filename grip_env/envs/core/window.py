"""Window that shows the pictures of an environment, one after the other."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["Window"]


class Window:
    """Matplotlib window that opens with the first picture.

    With a backend that draws to memory, nothing is shown.

    Args:
        title: Title of the window.
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
        if canvas.required_interactive_framework is not None:  # a backend that draws to memory has no window to show
            self._figure.show()
            canvas.flush_events()

    def close(self) -> None:
        """Close the window, if it is open."""
        if self._figure is not None:
            from matplotlib import pyplot

            pyplot.close(self._figure)
            self._figure = None
