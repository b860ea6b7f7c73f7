"""Files and folders that appear on disk whole or not at all, whatever stops the program that writes them."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO

__all__ = ["content_of", "folder_on_disk", "remove", "replace_folder", "write_atomically"]

_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_HERE = -100  # AT_FDCWD


def write_atomically(path: Path, data: bytes | str, durable: bool = False) -> None:
    """Write a file by way of a temporary one beside it, so that readers see all of it or none.

    Args:
        path: The file, whose folder is made; one that is there is replaced.
        data: Its content; text is written as UTF-8.
        durable: Wait until it is on the disk, so that a power cut leaves the old file or the new one.

    Raises:
        OSError: If that cannot be done; nothing is left behind then.
    """
    temporary = path.with_name(f"{path.stem[:150]}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        if durable:
            _sync(temporary)
        now = time.time_ns()  # the file system's own clock may tick too slowly to tell files apart
        os.utime(temporary, ns=(now, now))
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def content_of(write: Callable[[IO[bytes]], object]) -> bytes:
    """Return what ``write`` writes into a file, as a picture's ``save`` does."""
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def replace_folder(new: Path, folder: Path) -> None:
    """Put a folder (or a file) that is complete in the place of another, which is removed.

    Where the system can exchange two names (Linux), there is a whole one at every moment. Elsewhere there is none for a
    moment, and one who stops then leaves it under another name: :func:`folder_on_disk` finds it.

    Args:
        new: What is to be there, named ``{folder}.new``.
        folder: Where; need not exist.

    Raises:
        OSError: If that cannot be done; what was there stays.
    """
    for path in (new, *new.rglob("*")):
        if path.is_file() or os.name == "posix":  # other systems cannot open folders
            _sync(path)
    old = folder.with_name(f"{folder.name}.old")
    remove(old)
    if not folder.exists() or not (folder.is_dir() or new.is_dir()):
        os.replace(new, folder)
    elif _exchange(new, folder):
        remove(new)
    else:
        os.replace(folder, old)
        os.replace(new, folder)
        remove(old)


def folder_on_disk(folder: Path) -> Path:
    """Return where a folder is that :func:`replace_folder` put in place, even if it was stopped halfway."""
    old, new = (folder.with_name(f"{folder.name}.{ending}") for ending in ("old", "new"))
    # one with an old one beside it and none in its place was complete
    return new if not folder.exists() and old.exists() and new.exists() else folder


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() or os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file, or a folder as far as that can be done, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; returns whether the system could."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or an old one
        return False
    return rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0
