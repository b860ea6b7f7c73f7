"""How much memory a piece of work takes for tensors on the CPU."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["peak_bytes"]


def peak_bytes(work: Callable[[], object]) -> int:
    """Run ``work`` and return the most bytes that tensors it made took at one time.

    What PyTorch's allocator hands out is counted, as its profiler sees it; what was there before, and the scratch
    space libraries allocate for themselves, is not.
    """
    from torch.profiler import ProfilerActivity, profile

    with _muted(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    now = peak = 0
    for event in sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """Drop what libraries print on standard error: the profiler notes each start and stop there."""
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
