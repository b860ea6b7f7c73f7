"""A mapping with a limited number of entries that drops the least recently used ones."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

__all__ = ["LRU"]

Key = TypeVar("Key")
Value = TypeVar("Value")


class LRU(Generic[Key, Value]):
    """A mapping of at most ``size`` values; the least recently used ones are dropped first.

    >>> held = LRU(2)
    >>> held.put("a", 1), held.put("b", 2), held.get("a"), held.put("c", 3)
    (None, None, 1, None)
    >>> held.get("b"), held.values()
    (None, [1, 3])
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._held: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key) -> Value | None:
        """Return the value of ``key`` and mark it as used, or return ``None`` if it is absent."""
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def put(self, key: Key, value: Value) -> None:
        """Store ``value`` under ``key``."""
        self._held[key] = value
        self._held.move_to_end(key)
        while len(self._held) > self.size:
            self._held.popitem(last=False)

    def values(self) -> list[Value]:
        """Return all values, the least recently used first."""
        return list(self._held.values())
