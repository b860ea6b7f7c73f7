"""Width and precision of the features in an observation."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np
from gymnasium import spaces

from grip_env.envs.core.checks import is_whole

__all__ = ["OBS_DTYPES", "Features"]

OBS_DTYPES = ("float32", "float16")
"""Available precisions of an observation's features; NumPy has no bfloat16."""

_SEED = 0  # of the projection, which must be the same wherever an agent is used


class Features:
    """Conversion of the model's features into those of an observation.

    They are ``tokens`` and ``question``. The same projection serves both: a fixed D x F matrix of normal random numbers
    divided by the square root of F. It preserves lengths and inner products up to a relative error of about sqrt(2 / F)
    (Johnson and Lindenstrauss, 1984), so that similar tokens stay similar, as do a word and the tokens that show what
    it means.

    Args:
        width: D, the model's width.
        feature_dim: F, the width in the observation; ``None`` leaves the features as they are.
        dtype: "float32" or "float16", which halves the memory; numbers beyond its range are clipped to it.

    Raises:
        ValueError: If ``feature_dim`` is not from 1 to D, or the precision is unknown.

    >>> small = Features(4096, 256, "float16")
    >>> small(np.ones((576, 4096), dtype=np.float32)).shape
    (576, 256)

    Memory of 2,048 observations of 576 tokens and 24 words, in GB, without and with these settings:

    >>> [round(2048 * 600 * each.width * each.dtype.itemsize / 1e9, 2) for each in (Features(4096), small)]
    [20.13, 0.63]
    """

    def __init__(self, width: int, feature_dim: int | None = None, dtype: str = "float32") -> None:
        if feature_dim is not None and not (is_whole(feature_dim) and 1 <= feature_dim <= width):
            raise ValueError(
                f"feature_dim must be from 1 to {width}, the width of this model's visual tokens; got {feature_dim!r}: "
                "leave it out for the full width"
            )
        if dtype not in OBS_DTYPES:
            raise ValueError(f"obs_dtype must be 'float32' or 'float16'; got {dtype!r}")
        self.from_width = width
        self.width = width if feature_dim is None else feature_dim
        self.projected = feature_dim is not None
        self.dtype = np.dtype(dtype)

    @cached_property
    def matrix(self) -> np.ndarray:
        """Projection matrix, float32 (D, F)."""
        draws = np.random.default_rng(_SEED).standard_normal((self.from_width, self.width), dtype=np.float32)
        return draws / np.float32(math.sqrt(self.width))

    @property
    def limit(self) -> float:
        """Largest finite number of the precision.

        It bounds the space, since Gymnasium's checker warns about infinite bounds.
        """
        return float(np.finfo(self.dtype).max)

    def space(self, rows: int) -> spaces.Box:
        """Return the space of ``rows`` feature vectors, (rows, F)."""
        low, high = (np.full((rows, self.width), bound, dtype=self.dtype) for bound in (-self.limit, self.limit))
        box: Any = spaces.Box(low, high, dtype=self.dtype.type)
        return box

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Convert float32 (..., D) to (..., F) of the chosen precision.

        Where nothing changes, ``rows`` itself is returned.
        """
        if self.projected:
            rows = rows @ self.matrix
        return rows if rows.dtype == self.dtype else rows.clip(-self.limit, self.limit).astype(self.dtype)
