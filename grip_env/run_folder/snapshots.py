"""Snapshots in the folder of a run, and logs that end where one of them was taken."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from grip_env.common.atomic_files import write_atomically
from grip_env.run_folder.folder import read_rows

__all__ = ["keep_snapshot", "rewind_logs", "snapshots"]

FOLDER = "snapshots"
KEPT = 2
"""How many snapshots are kept: if the last one is damaged, there is another."""


def snapshots(run: Path) -> list[Path]:
    """Return the snapshots of a run, the newest first."""
    return sorted((run / FOLDER).glob("*.safetensors"), reverse=True)


def keep_snapshot(run: Path, number: int, write: Callable[[Path], object]) -> None:
    """Write a snapshot, and delete all but the newest ones.

    Args:
        run: Folder of the run.
        number: Number of steps taken so far.
        write: Writes the snapshot to a path.
    """
    write(run / FOLDER / f"{number:09d}.safetensors")
    for old in snapshots(run)[KEPT:]:
        with contextlib.suppress(OSError):
            old.unlink()


def rewind_logs(run: Path, steps: Mapping[str, int]) -> None:
    """Remove what was logged after a snapshot, in tables and in TensorBoard.

    Args:
        run: Folder of the run.
        steps: Number of steps taken in each phase.
    """
    for path in run.glob("*.csv"):
        names, rows = read_rows(path)
        kept = [row for row in rows if float(row[0]) < steps.get(path.stem, 0)]
        if kept:
            text = io.StringIO()
            csv.writer(text).writerows([names, *kept])
            write_atomically(path, text.getvalue())
        else:
            path.unlink()
    _rewind_events(run, steps)


def _rewind_events(run: Path, steps: Mapping[str, int]) -> None:
    """Write the events before the snapshot into one file, and remove the files they are from."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    paths = sorted(run.glob("events.out.tfevents.*"))
    kept = io.BytesIO()
    writer = RecordWriter(kept)
    for data in _records(paths):
        event = Event.FromString(data)
        if all(_before(value.tag, event.step, steps) for value in event.summary.value):
            writer.write(data)
    if paths:
        write_atomically(paths[0], kept.getvalue())
        for path in paths[1:]:
            path.unlink()


def _records(paths: list[Path]) -> Iterator[bytes]:
    """Yield the records of event files, without a last one that was cut."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader

    for path in paths:
        yield from RawEventFileLoader(str(path)).Load()


def _before(tag: str, step: int, steps: Mapping[str, int]) -> bool:
    """Return whether a point was logged before the snapshot.

    Curves are named phase/key, with steps counted from 0. Pictures have the number of steps after the warm-up.
    """
    phase, slash, _ = tag.partition("/")
    if slash:
        return step < steps.get(phase, 0)
    last = [phase for phase in steps if phase != "warmup"]
    return step <= (steps[last[-1]] if last else 0)
