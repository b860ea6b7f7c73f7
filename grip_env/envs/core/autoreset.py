"""Gymnasium's three autoreset modes, and a warning about one of them."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import gymnasium
from gymnasium.vector import AutoresetMode, VectorEnv

__all__ = ["resolve_autoreset_mode", "warn_of_idle_steps", "warn_where_steps_are_idle"]

_told: weakref.WeakSet[Any] = weakref.WeakSet()
"""Environments and wrappers for which the warning has been given."""


def resolve_autoreset_mode(mode: AutoresetMode | str) -> AutoresetMode:
    """Return an autoreset mode, given itself or its name, such as "NextStep" or "NEXT_STEP".

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


def warn_of_idle_steps(owner: object, every: bool = True) -> None:
    """Warn once that with AutoresetMode.NEXT_STEP every second step is a reset.

    Args:
        owner: The environment or wrapper that resets.
        every: True if all episodes have one step, False if one of them had.
    """
    if owner in _told:
        return
    _told.add(owner)
    gymnasium.logger.warn(
        f"{'every episode here has' if every else 'an episode here had'} one step, so that with "
        "AutoresetMode.NEXT_STEP every second step ignores its action, begins the next episode and pays 0, the reward "
        "for losing nothing: a mean over steps looks too good. Average over episodes, or use AutoresetMode.SAME_STEP, "
        "as gymnasium.make_vec does without a vectorization_mode"
    )


def warn_where_steps_are_idle(env: object, every: bool = True) -> None:
    """Warn once per caller that resets ``env`` in a step of its own.

    It is a vector environment of Gymnasium, or its wrapper Autoreset.

    A single environment is not told who resets it, or why, so the callers are looked up on the call stack.

    Args:
        env: The single environment.
        every: See :func:`warn_of_idle_steps`.
    """
    from gymnasium.wrappers import Autoreset  # with all other wrappers: not for everyone who imports the package

    frame = inspect.currentframe()
    while frame is not None:
        names = frame.f_locals
        owner = names.get("self")
        command: Any = frame.f_code.co_name
        if isinstance(owner, VectorEnv):
            mode = getattr(owner, "autoreset_mode", None)
        elif isinstance(owner, Autoreset):
            mode = AutoresetMode.NEXT_STEP
        else:  # the loop of a worker process of AsyncVectorEnv
            owner, mode, command = env, names.get("autoreset_mode"), names.get("command")
        if mode is AutoresetMode.NEXT_STEP and command == "step":
            warn_of_idle_steps(owner, every)
            return
        frame = frame.f_back
