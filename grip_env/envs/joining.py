"""What single environments would return, joined to what a vector environment returns.

Gymnasium joins infos one by one and observations with ``numpy.stack``, which for 64 instances takes as long as a tenth
of the language model's answer; this does the same column by column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from grip_env.envs.episodes import Observation

__all__ = ["joined_infos", "joined_observations"]


def joined_observations(rows: Sequence[Observation]) -> Observation:
    """Return one array (B, ...) for each key, a fresh copy.

    >>> joined_observations([{"budget": np.array([0.5])}, {"budget": np.array([0.25])}])["budget"].tolist()
    [[0.5], [0.25]]
    """
    joined: Observation = {}
    for key, first in rows[0].items():
        column = np.empty((len(rows), *first.shape), dtype=first.dtype)
        for place, row in zip(column, rows, strict=True):
            place[:] = row[key]
        joined[key] = column
    return joined


def joined_infos(infos: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """Return the infos of a vector environment: an array (B, ...) for each key, and with it a mask ``_key``, bool (B,).

    Numbers and arrays become arrays of their type, 0 where an instance lacks the key; dicts are joined in turn; all
    else, and the dicts in ``final_obs``, become arrays of objects: as Gymnasium's ``VectorEnv._add_info`` has it.

    Args:
        infos: One for each instance; ``None`` is an empty one. Under each key all values are of one kind.

    >>> joined = joined_infos([{"k": 3}, {"kept": [1, 2]}])
    >>> joined["k"].tolist(), joined["_k"].tolist(), joined["kept"].tolist()
    ([3, 0], [True, False], [None, [1, 2]])
    """
    joined: dict[str, Any] = {}
    given = [{} if info is None else info for info in infos]
    alike = all(info.keys() == given[0].keys() for info in given)  # as a rule
    for key in given[0] if alike else dict.fromkeys(key for info in given for key in info):
        known = np.ones(len(given), dtype=bool) if alike else np.array([key in info for info in given])
        values = [info[key] for info in given if alike or key in info]
        joined[key] = (
            joined_infos([info.get(key) for info in given])
            if isinstance(values[0], dict) and key != "final_obs"
            else _column(values, known)
        )
        joined[f"_{key}"] = known
    return joined


def _column(values: list[Any], known: np.ndarray) -> np.ndarray:
    first = values[0]
    if isinstance(first, bool | int | float | np.number):
        column = np.zeros(len(known), dtype=type(first))
        column[known] = values
    elif isinstance(first, np.ndarray):
        column = np.zeros((len(known), *first.shape), dtype=first.dtype)
        column[known] = values
    else:
        column = np.full(len(known), None, dtype=object)
        for row, value in zip(np.flatnonzero(known).tolist(), values, strict=True):
            column[row] = value
    return column
