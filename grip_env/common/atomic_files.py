"""Atomic writing of files and folders: they appear on disk whole or not at all."""

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
    """Write a file through a temporary one beside it, so that readers see all of it or nothing.

    Args:
        path: The file. Its folder is created if needed; an existing file is replaced.
        data: The content; text is written as UTF-8.
        durable: Wait until the content is on the disk, so that a power cut leaves either the old file or the new one.

    Raises:
        OSError: If the file cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f"{path.stem[:150]}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        if durable:
            _sync(temporary)
        now = time.time_ns()  # the clock of the file system may be too coarse to distinguish files
        os.utime(temporary, ns=(now, now))
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def content_of(write: Callable[[IO[bytes]], object]) -> bytes:
    """Return the bytes that ``write``, such as the ``save`` of a picture, writes into a file."""
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def replace_folder(new: Path, folder: Path) -> None:
    """Replace a folder (or file) by a complete new one, and remove the old one.

    On Linux, where two names can be exchanged in one step, a complete folder is in place at every moment. Elsewhere
    the folder is absent for a moment; if the program stops then, :func:`folder_on_disk` finds it under another name.

    Args:
        new: The new folder, named ``{folder}.new``.
        folder: The folder to replace; it need not exist.

    Raises:
        OSError: If the folder cannot be replaced; the old one stays.
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
    """Return the actual path of a folder, even if :func:`replace_folder` was stopped halfway."""
    old, new = (folder.with_name(f"{folder.name}.{ending}") for ending in ("old", "new"))
    # if the old one was moved away and none is in place, the new one was complete
    return new if not folder.exists() and old.exists() and new.exists() else folder


def _sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() or os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file or folder if it exists; errors within a folder are ignored."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step, and return whether the system supports it."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or an old one
        return False
    return rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0
