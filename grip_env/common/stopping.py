"""Handling of the signals that ask a program to stop: SIGINT, SIGTERM and SIGHUP.

Inside :func:`handled`, the first signal raises :class:`Stopped` immediately, with two exceptions: inside :func:`held`
it waits until the context ends, and code run by :func:`patiently` has a few seconds to finish. Later signals have no
effect. Signals that are ignored (``nohup``) or have other handlers are left alone. Outside the main thread, where
Python handles no signals, the functions of this module have no effect.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

__all__ = [
    "GRACE",
    "Stopped",
    "acknowledge",
    "at_once",
    "begin",
    "check",
    "end_soon",
    "handled",
    "held",
    "patiently",
    "quit_while_starting",
    "whole_updates",
]

GRACE = 3.0
"""Seconds that code run by :func:`patiently` has to finish; also the time after which a swallowed stop is raised again.

A bare ``except``, for example, swallows a stop.
"""

_T = TypeVar("_T")
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_AT_ONCE, _PATIENTLY, _HELD = range(3)


class Stopped(KeyboardInterrupt):
    """Error raised when a signal asks the program to stop.

    ``code`` is the exit code that shells use for this, 128 plus the number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class _State:
    """The signals received by this process.

    Handlers may change the state between any two instructions of the main thread.
    """

    def __init__(self) -> None:
        self.process = os.getpid()
        self.installed: dict[int, Any] = {}  # the previous handlers of these signals
        self.mode = _AT_ONCE
        self.received = 0
        self.acknowledged = False
        self.overdue = False  # the grace period is over
        self.raised = -GRACE  # time of the last raise
        self.updating = False  # an optimiser is writing weights
        self.news: queue.SimpleQueue[int] = queue.SimpleQueue()  # the only queue that is safe in signal handlers

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        if os.getpid() != self.process:  # a forked child, which stops as by default
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.acknowledged:
            if not self.received:
                self.received = number
                self.news.put(number)
            self.deliver()

    def deliver(self) -> None:
        """Raise :class:`Stopped` if a signal is pending and may be raised now."""
        wait = self.mode == _HELD or self.updating or (self.mode == _PATIENTLY and not self.overdue)
        if wait or not self.received or self.acknowledged or time.monotonic() < self.raised + GRACE:
            return
        self.raised = time.monotonic()
        raise Stopped(self.received)

    def remind(self) -> None:
        """Repeat the signal until it is acknowledged or the handlers are removed.

        This runs in a separate thread.
        """
        number = self.news.get()
        while number:
            try:
                number = self.news.get(timeout=GRACE)
            except queue.Empty:
                self.overdue = True
                if hasattr(signal, "pthread_kill"):  # also wakes blocking calls
                    signal.pthread_kill(threading.main_thread().ident or 0, number)
                else:
                    _thread.interrupt_main(signal.Signals(number))
                if self.acknowledged:
                    return


_state = _State()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Handle the signals within the context; a nested context has no effect."""
    global _state
    known = (signal.SIG_DFL, signal.default_int_handler, _quit)
    numbers = [number for number in _SIGNALS if _in_main_thread() and signal.getsignal(number) in known]
    if not numbers:
        yield
        return
    _state = state = _State()
    reminder = threading.Thread(target=state.remind, name="stopping", daemon=True)
    reminder.start()
    try:
        for number in numbers:
            state.installed[number] = signal.signal(number, state.handle)
        yield
    finally:
        state.acknowledged = True
        state.news.put(0)
        reminder.join()  # it must not send signals after the handlers are removed
        for number, before in state.installed.items():
            signal.signal(number, before)
        _state = _State()


@contextlib.contextmanager
def _mode(mode: int) -> Iterator[None]:
    state = _state
    if not _in_main_thread():
        yield
        return
    before = state.mode
    try:
        state.mode = mode
        yield
    finally:
        state.mode = before


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Delay signals until the context ends."""
    with _mode(_HELD):
        yield
    if _state.mode != _HELD:
        check()


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Allow signals to interrupt the context, even inside :func:`held`."""
    with _mode(_AT_ONCE):
        check()
        yield


def patiently(work: Callable[[], _T]) -> _T:
    """Return the result of ``work()``, which a signal interrupts after :data:`GRACE` seconds.

    If ``work()`` finishes before that, the signal waits for a :func:`check`, so that the result is not lost.
    """
    with _mode(_PATIENTLY):
        return work()


def check() -> None:
    """Raise :class:`Stopped` if an unacknowledged signal has come, even inside :func:`held`."""
    state = _state
    if _in_main_thread() and state.received and not state.acknowledged:
        state.raised = time.monotonic()
        raise Stopped(state.received)


def acknowledge() -> None:
    """Mark the signal as handled, so that no signal is raised from now on."""
    if _in_main_thread():
        _state.acknowledged = True


@contextlib.contextmanager
def whole_updates() -> Iterator[Callable[[], bool]]:
    """Delay signals during the steps of all PyTorch optimisers within the context.

    A signal during a step would leave the weights half updated.

    Yields:
        A function that returns whether a step has begun but not finished, so that the weights are half updated.
    """
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    state = _state if _in_main_thread() else _State()
    thread = threading.get_ident()

    def begin(*_: Any) -> None:
        if threading.get_ident() == thread:
            state.updating = True

    def end(*_: Any) -> None:
        if threading.get_ident() == thread:
            state.updating = False
            state.deliver()

    hooks = [register_optimizer_step_pre_hook(begin), register_optimizer_step_post_hook(end)]
    try:
        yield lambda: state.updating
    finally:
        for hook in hooks:
            hook.remove()
        state.updating = False


# -- before and after a command ----------------------------------------------------------------------------------

_begun = False


def _quit(number: int, frame: FrameType | None = None) -> None:
    """End the process immediately, with a message only if no command has begun.

    Before a command there is nothing to save, and after it nothing to report.
    """
    if not _begun:
        with contextlib.suppress(OSError):
            os.write(1, b"\ninterrupted before it began; nothing was written.\n")
    os._exit(128 + number)


def quit_while_starting() -> None:
    """Make signals end ``python -m grip_env.COMMAND`` with one line while it is importing."""
    for number in _SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _quit)


def begin() -> None:
    """Mark the command as begun; from now on it reports interruptions itself."""
    global _begun
    _begun = True


def end_soon(code: int, seconds: float = 5.0) -> None:
    """End the process of ``python -m grip_env.COMMAND`` some seconds after its command.

    A forgotten thread keeps Python from exiting. Signals are ignored in the meantime: Python restores their default
    actions on exit, and a signal would then replace the exit code.

    Args:
        code: The exit code.
        seconds: Time until the process is ended.
    """
    ours = [number for number in _SIGNALS if signal.getsignal(number) is _quit]
    if ours or _quit in _state.installed.values():
        for number in ours:
            signal.signal(number, signal.SIG_IGN)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        timer = threading.Timer(seconds, os._exit, [code])
        timer.daemon = True
        timer.start()
