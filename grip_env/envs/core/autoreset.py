"""When a vector environment begins the next episode: Gymnasium's three modes, and a warning about one of them."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import gymnasium
from gymnasium.vector import AutoresetMode, VectorEnv

__all__ = ["resolve_autoreset_mode", "warn_of_idle_steps", "warn_where_steps_are_idle"]

_told: weakref.WeakSet[Any] = weakref.WeakSet()
"""Vector environments that had their warning."""


def resolve_autoreset_mode(mode: AutoresetMode | str) -> AutoresetMode:
    """Return the mode of a name such as "NextStep" or "NEXT_STEP", or the mode itself.

    >>> resolve_autoreset_mode("NextStep") is resolve_autoreset_mode("next_step") is AutoresetMode.NEXT_STEP
    True

    Raises:
        ValueError: If there is no such mode.
    """
    if isinstance(mode, AutoresetMode):
        return mode
    for known in AutoresetMode:
        if isinstance(mode, str) and mode.replace("_", "").lower() == known.value.lower():
            return known
    names = ", ".join(f'"{known.value}"' for known in AutoresetMode)
    raise ValueError(f"autoreset_mode is a gymnasium.vector.AutoresetMode or its name, one of {names}; got {mode!r}")


def warn_of_idle_steps() -> None:
    """Warn that half of what AutoresetMode.NEXT_STEP returns is no decision, where episodes have one step."""
    gymnasium.logger.warn(
        "every episode here has one step, so that with AutoresetMode.NEXT_STEP every second step ignores its action, "
        "begins the next episode and pays 0, which stands for nothing lost: a mean over steps is flattered. Average "
        "over episodes, or use AutoresetMode.SAME_STEP, as gymnasium.make_vec does without a vectorization_mode"
    )


def warn_where_steps_are_idle(env: object) -> None:
    """Warn once for each vector environment of Gymnasium that resets ``env`` in a step of its own.

    A single environment is not told who resets it, or why: only the call itself shows it.
    """
    frame = inspect.currentframe()
    while frame is not None:
        names = frame.f_locals
        owner = names.get("self")
        command: Any = frame.f_code.co_name
        if isinstance(owner, VectorEnv):
            mode = getattr(owner, "autoreset_mode", None)
        else:  # the loop of a process of AsyncVectorEnv
            owner, mode, command = env, names.get("autoreset_mode"), names.get("command")
        if mode is AutoresetMode.NEXT_STEP and command == "step":
            if owner not in _told:
                _told.add(owner)
                warn_of_idle_steps()
            return
        frame = frame.f_back
