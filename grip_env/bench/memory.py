"""Peak memory of tensors on the CPU."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["peak_bytes"]


def peak_bytes(work: Callable[[], object]) -> int:
    """Run ``work`` and return the peak bytes of the tensors that it makes.

    Allocations of PyTorch's allocator count, as its profiler sees them. Tensors that existed before and scratch space
    that libraries allocate themselves do not.
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
    """Silence standard error, where the profiler reports each start and stop."""
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
