"""How wide and how precise the features in an observation are."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np
from gymnasium import spaces

from grip_env.envs.core.checks import is_whole

__all__ = ["OBS_DTYPES", "Features"]

OBS_DTYPES = ("float32", "float16")
"""Precisions an observation's features can have; NumPy has no bfloat16."""

_SEED = 0  # of the projection: it must be the same wherever an agent is used


class Features:
    """Makes an observation's features, ``tokens`` and ``question``, of the model's own.

    A projection is a fixed D x F matrix of normal random numbers over the square root of F, the same for tokens and
    words. It keeps lengths and inner products up to a relative error of about sqrt(2 / F) (Johnson and Lindenstrauss,
    1984), so that what looks alike still does, and a word still resembles the tokens that show what it means.

    Args:
        width: D, the model's width.
        feature_dim: F, the width in the observation; ``None`` leaves the features as they are.
        dtype: "float32" or "float16", which halves the memory; numbers beyond its range become the largest it has.

    Raises:
        ValueError: If ``feature_dim`` is not from 1 to D, or the precision is another.

    >>> small = Features(4096, 256, "float16")
    >>> small(np.ones((576, 4096), dtype=np.float32)).shape
    (576, 256)

    What 2,048 observations of 576 tokens and 24 words take, in GB, as they are and then:

    >>> [round(2048 * 600 * each.width * each.dtype.itemsize / 1e9, 2) for each in (Features(4096), small)]
    [20.13, 0.63]
    """

    def __init__(self, width: int, feature_dim: int | None = None, dtype: str = "float32") -> None:
        if feature_dim is not None and not (is_whole(feature_dim) and 1 <= feature_dim <= width):
            raise ValueError(
                f"feature_dim must be from 1 to {width}, the width of this model's visual tokens; got {feature_dim!r}: "
                "leave it out to have them as they are"
            )
        if dtype not in OBS_DTYPES:
            raise ValueError(f"obs_dtype must be 'float32' or 'float16'; got {dtype!r}")
        self.from_width = width
        self.width = width if feature_dim is None else feature_dim
        self.projected = feature_dim is not None
        self.dtype = np.dtype(dtype)

    @cached_property
    def matrix(self) -> np.ndarray:
        """The projection, float32 (D, F)."""
        draws = np.random.default_rng(_SEED).standard_normal((self.from_width, self.width), dtype=np.float32)
        return draws / np.float32(math.sqrt(self.width))

    @property
    def limit(self) -> float:
        """The largest number of its precision: infinite bounds would make Gymnasium's checker complain."""
        return float(np.finfo(self.dtype).max)

    def space(self, rows: int) -> spaces.Box:
        """Return the space of ``rows`` features, (rows, F)."""
        low, high = (np.full((rows, self.width), bound, dtype=self.dtype) for bound in (-self.limit, self.limit))
        box: Any = spaces.Box(low, high, dtype=self.dtype.type)
        return box

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Return what float32 (..., D) looks like, (..., F) of the chosen precision; itself where that is no change."""
        if self.projected:
            rows = rows @ self.matrix
        return rows if rows.dtype == self.dtype else rows.clip(-self.limit, self.limit).astype(self.dtype)
