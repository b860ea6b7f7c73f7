"""The error with which a command ends after wrong input."""

from __future__ import annotations

import sys

__all__ = ["CommandError"]


class CommandError(SystemExit):
    """Exit of a command with a message on standard error.

    The exit code is 2, the shell's code for wrong usage.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = 2
        print(f"error: {message}", file=sys.stderr)
