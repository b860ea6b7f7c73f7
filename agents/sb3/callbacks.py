"""What lets a training of Stable-Baselines3 be taken update by update, and keep its random numbers to itself."""

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
    """A learning rate that falls along a line, whatever the library believes of its progress.

    ``learn`` is called once per update, and takes each call for a whole training.

    Args:
        peak: At update 0.
        over: Updates over which it falls to 0; 0 leaves it at the peak.
    """

    def __init__(self, peak: float, over: int) -> None:
        self.peak, self.over, self.update = peak, over, 0

    def __call__(self, progress_remaining: float) -> float:
        """Return the learning rate of the current update."""
        return self.peak * (1 - self.update / self.over if self.over else 1)


class Randomness:
    """The random numbers of one agent, which the library takes from global generators: lent to it, and put back.

    Args:
        device: Where actions are drawn.
    """

    def __init__(self, device: torch.device) -> None:
        self._devices = [device] if device.type == "cuda" else []
        self._state: list[Any] | None = None

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Put this agent's generators in the place of the global ones while the context lasts."""
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
    """Means over the episodes that ended in the last rollout in which any did."""

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
