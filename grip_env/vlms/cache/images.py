"""Disk cache of encoded images.

With it, each image goes through a vision encoder once instead of once per run. An entry is one safetensors file; see
:mod:`grip_env.vlms.cache.image_entries` for its name and content.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grip_env.common.atomic_files import write_atomically
from grip_env.vlms.cache.image_entries import pack, picture_key, unpack
from grip_env.vlms.families.base import Picture

__all__ = ["CacheStatistics", "PictureCache"]

STALE = 3600.0
"""Age in seconds after which a temporary file counts as abandoned."""
ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
TEMPORARY = re.compile(r"[0-9a-f]{64}\.[0-9a-f]{32}\.tmp")


@dataclass
class CacheStatistics:
    """Statistics of a cache object since it was created.

    Other processes and copies of the object keep their own.
    """

    hits: int = 0
    """Images read from disk; an image that occurs several times in a batch is looked up once."""
    misses: int = 0
    """Images that had to be encoded."""
    corrupt: int = 0
    """Misses because an entry was damaged; such entries are deleted."""
    evicted: int = 0
    """Entries deleted to make room."""
    failed: int = 0
    """Entries that could not be read or written, as with a full disk, a read-only folder or too large an entry."""
    bytes: int = 0
    """Total size of all entries, as far as this process knows."""


class PictureCache:
    """Encoded images in a folder, which several processes may use at the same time.

    Args:
        folder: Folder of the cache, created at the first write. Files with other names in it are left alone.
        max_bytes: Maximum total size of the entries. Above it, the least recently used are deleted, down to 90 % of it.

    Raises:
        ValueError: If ``folder`` is a file or ``max_bytes`` is not positive.

    Entries are read back bit for bit. The missing images of a batch are encoded together, each once. A batch of
    different images that are all missing therefore gives the same bits as without a cache, now and whenever it is
    read. If only some are missing, they are encoded in a smaller batch, in which the kernels of some models sum in
    another order. The results are then equal up to float rounding, as with any other batch size (less than 1e-5 in
    the float32 tokens of the supported families, less than 1e-4 in log-likelihood).

    Problems with the folder never stop the caller: an entry that cannot be read is encoded, one that cannot be written
    is not kept, and the first such failure gives a RuntimeWarning. If several processes write, each may exceed the
    maximum size by a twentieth of it plus one entry, until it next lists the folder. A copied or unpickled cache has
    the same folder and new statistics.
    """

    def __init__(self, folder: str | Path, max_bytes: int = 4 * 2**30) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"the image cache {folder} is a file: give a folder")
        if max_bytes <= 0:
            raise ValueError(f"max_bytes must be positive, not {max_bytes}: leave the cache out to have none")
        self.max_bytes = max_bytes
        self._statistics = CacheStatistics()
        self._lock = threading.RLock()
        self._total: int | None = None  # size of all entries: as listed, then with what this process wrote
        self._unlisted = 0  # bytes written by this process since the last listing
        self._warned = False

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self.max_bytes)

    @property
    def statistics(self) -> CacheStatistics:
        """Copy of the statistics so far."""
        with self._lock:
            if self._total is None:
                with contextlib.suppress(OSError):
                    self._list()
            return replace(self._statistics, bytes=self._total or 0)

    def describe(self) -> str:
        """Return the statistics as one line for logs."""
        now = self.statistics
        share = now.hits / max(1, now.hits + now.misses)
        return (
            f"image cache {self.folder}: {now.hits} hits, {now.misses} misses ({share:.0%} hits), {now.corrupt} "
            f"corrupt, {now.evicted} evicted, {now.failed} failed, {now.bytes / 2**20:.1f} of "
            f"{self.max_bytes / 2**20:.1f} MiB"
        )

    def pictures(
        self,
        scope: str,
        images: Sequence[np.ndarray],
        encode: Callable[[list[np.ndarray]], list[Picture]],
        device: torch.device,
    ) -> list[Picture]:
        """Return encoded images; equal images share one object.

        Args:
            scope: The return value of :func:`~grip_env.vlms.cache.image_entries.picture_scope`.
            images: The images.
            encode: Function that encodes the missing images; called once or not at all.
            device: Device of the returned tensors.
        """
        keys = [picture_key(scope, image) for image in images]
        found: dict[str, Picture] = {}
        missing: dict[str, np.ndarray] = {}
        for key, image in dict(zip(keys, images, strict=True)).items():
            picture = self.get(key)
            if picture is None:
                missing[key] = image
            else:
                fields: dict[str, Any] = {
                    name: value.to(device) if isinstance(value, torch.Tensor) else value
                    for name, value in vars(picture).items()
                }
                found[key] = Picture(**fields)
        if missing:
            found.update(zip(missing, encode(list(missing.values())), strict=True))
            for key in missing:
                self.put(key, found[key])
        return [found[key] for key in keys]

    def path(self, key: str) -> Path:
        """Return the path of an entry, whether it exists or not."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, key: str) -> Picture | None:
        """Return an entry with its tensors on the CPU, or ``None`` if missing or unreadable."""
        path = self.path(key)
        try:
            picture = unpack(key, path.read_bytes())
        except FileNotFoundError:
            self._count(misses=1)
        except OSError as error:
            self._count(misses=1)
            self._fail("read", error)
        except ValueError:
            with contextlib.suppress(OSError):
                path.unlink()
            self._count(misses=1, corrupt=1)
        else:
            now = time.time_ns()
            with contextlib.suppress(OSError):  # evicted since, or the folder is read-only
                os.utime(path, ns=(now, now))
            self._count(hits=1)
            return picture
        return None

    def put(self, key: str, picture: Picture) -> None:
        """Write an entry, and delete others if there is no room.

        If the entry cannot be written, the failure is counted, and nothing is raised.
        """
        data = pack(key, picture)
        path = self.path(key)
        reserved = 0
        try:
            self._reserve(len(data))
            reserved = len(data)
            write_atomically(path, data)
        except OSError as error:
            with self._lock:
                self._total = None if self._total is None else self._total - reserved
            self._fail("written", error)

    # -- room ------------------------------------------------------------------------------------------------

    def _reserve(self, size: int) -> None:
        """Make room for ``size`` bytes and count them as used.

        Raises:
            OSError: If that is impossible.
        """
        if size > self.max_bytes:
            raise OSError(f"an entry of {size} bytes is larger than the whole cache, of {self.max_bytes}: enlarge it")
        with self._lock:
            # other processes write too, so list again before this one has written much
            if self._total is None or self._total + size > self.max_bytes or self._unlisted > self.max_bytes // 20:
                entries = self._list()
                if self._total is not None and self._total + size > self.max_bytes:
                    self._evict(entries, max(0, self.max_bytes * 9 // 10 - size))
            self._total = (self._total or 0) + size
            self._unlisted += size

    def _list(self) -> list[tuple[int, int, Path]]:
        """Return time of last use, size and path of all entries; delete abandoned files."""
        entries = []
        for folder in self.folder.glob("[0-9a-f][0-9a-f]"):
            for path in folder.iterdir():
                with contextlib.suppress(FileNotFoundError):  # others evict as well
                    if ENTRY.fullmatch(path.name):
                        found = path.stat()
                        entries.append((found.st_mtime_ns, found.st_size, path))
                    elif TEMPORARY.fullmatch(path.name) and time.time() - path.stat().st_mtime > STALE:
                        path.unlink()
        self._total = sum(size for _, size, _ in entries)
        self._unlisted = 0
        return entries

    def _evict(self, entries: list[tuple[int, int, Path]], goal: int) -> None:
        """Delete the least recently used of the entries until at most ``goal`` bytes are left."""
        left = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if left <= goal:
                break
            try:
                path.unlink()
                self._statistics.evicted += 1
            except FileNotFoundError:  # another process was faster
                pass
            left -= size
        self._total = left

    # -- accounts --------------------------------------------------------------------------------------------

    def _count(self, hits: int = 0, misses: int = 0, corrupt: int = 0) -> None:
        with self._lock:
            self._statistics.hits += hits
            self._statistics.misses += misses
            self._statistics.corrupt += corrupt
            if corrupt:  # the size with which it was counted is unknown
                self._total = None

    def _fail(self, what: str, error: OSError) -> None:
        with self._lock:
            self._statistics.failed += 1
            first, self._warned = not self._warned, True
        if first:
            warnings.warn(
                f"the image cache {self.folder} cannot be {what} ({error}); images are encoded anew where it fails",
                RuntimeWarning,
                stacklevel=2,
            )
