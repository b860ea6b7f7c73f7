"""The one way in which a command ends because of what it was given."""

from __future__ import annotations

import sys

__all__ = ["CommandError"]


class CommandError(SystemExit):
    """Ends a command with a message on standard error and exit code 2, the shell's code for wrong usage."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = 2
        print(f"error: {message}", file=sys.stderr)
