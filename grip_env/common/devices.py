"""Device and threads of a command, checked before the work starts."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from grip_env.common.errors import CommandError

if TYPE_CHECKING:
    import torch

__all__ = ["find_device", "set_threads"]


def find_device(name: str) -> torch.device:
    """Return the device of this name; "auto" takes a CUDA device if there is one.

    Raises:
        CommandError: If there is no such device.
    """
    import torch

    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(automatic if name == "auto" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        reason = "there is no such device" if reason.startswith("Expected one of") else reason
        raise CommandError(f"cannot use --device {name!r} ({reason}): choose cpu, or leave it out") from None
    return device


def set_threads(threads: int) -> None:
    """Set the number of PyTorch's threads unless it is 0.

    Raises:
        CommandError: If it is negative, or so large that starting them could end the process.
    """
    if threads < 0:
        raise CommandError(f"--threads must be at least 0; got {threads}")
    if threads > (most := max(1024, os.cpu_count() or 1)):
        raise CommandError(f"--threads must be at most {most:,}; got {threads}")
    if threads:
        import torch

        torch.set_num_threads(threads)
