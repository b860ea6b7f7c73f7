"""Import of user-defined classes from the current folder."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

__all__ = ["importable_from_here"]


@contextlib.contextmanager
def importable_from_here(folder: str = "") -> Iterator[None]:
    """Add the current folder, or another, to the end of the import path within the context.

    User-defined classes can then be imported from there.
    """
    sys.path.append(folder)
    try:
        yield
    finally:
        places = [place for place, known in enumerate(sys.path) if known == folder]
        del sys.path[places[-1]]
