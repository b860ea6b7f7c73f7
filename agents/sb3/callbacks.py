"""Helpers to train Stable-Baselines3 update by update, with random numbers of its own."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback

__all__ = ["Anneal", "Episodes", "Randomness"]


class Anneal:
    """Learning rate that falls linearly with the updates.

    It ignores the progress that the library reports: ``learn`` is called once per update, and the library treats each
    call as a whole training.

    Args:
        peak: Learning rate at update 0.
        over: Updates over which it falls to 0; 0 leaves it at the peak.
    """

    def __init__(self, peak: float, over: int) -> None:
        self.peak, self.over, self.update = peak, over, 0

    def __call__(self, progress_remaining: float) -> float:
        """Return the learning rate of the current update."""
        return self.peak * (1 - self.update / self.over if self.over else 1)


class Randomness:
    """Random state of one agent, swapped into the global generators that the library uses.

    Args:
        device: Device on which actions are drawn.
    """

    def __init__(self, device: torch.device) -> None:
        self._devices = [device] if device.type == "cuda" else []
        self._state: list[Any] | None = None

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Replace the global random state by this agent's within the context."""
        outer = random.getstate(), np.random.get_state()  # noqa: NPY002 (what Stable-Baselines3 uses)
        with torch.random.fork_rng(self._devices):
            if self._state is not None:
                random.setstate(self._state[0])
                np.random.set_state(self._state[1])  # noqa: NPY002
                torch.set_rng_state(self._state[2])
                for device, state in zip(self._devices, self._state[3], strict=True):
                    torch.cuda.set_rng_state(state, device)
            try:
                yield
            finally:
                cuda = [torch.cuda.get_rng_state(device) for device in self._devices]
                self._state = [random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda]  # noqa: NPY002
                random.setstate(outer[0])
                np.random.set_state(outer[1])  # noqa: NPY002


class Episodes(BaseCallback):
    """Callback with means over the episodes of the last rollout in which any ended."""

    def __init__(self) -> None:
        super().__init__()
        self.means: dict[str, float] = {}
        self._ended: list[tuple[float, ...]] = []

    def _on_rollout_start(self) -> None:
        self._ended = []

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                share = info["kept_count"] / info["k"]
                self._ended.append((info["episode"]["r"], info["log_likelihood"], float(info["correct"]), share))
        return True

    def _on_rollout_end(self) -> None:
        if self._ended:
            names = ("reward", "log_likelihood", "accuracy", "budget_used")
            self.means = dict(zip(names, np.mean(self._ended, 0).tolist(), strict=True))
