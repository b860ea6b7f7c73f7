"""Signals that ask a program to stop (SIGINT, SIGTERM, SIGHUP): where they interrupt it, and where they wait.

Inside :func:`handled` the first of them raises :class:`Stopped` at once, unless the code that runs is :func:`held`, and
nothing can happen to it, or runs :func:`patiently`, and has a few seconds to come to its end. Later ones change
nothing. Signals that the user had ignored (``nohup``) or handles otherwise stay as they were; outside the main thread,
where Python knows no signals, nothing of this has an effect.
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
"""Seconds that what runs patiently has to end by itself; also the time after which a stop that was swallowed (by an
``except`` without a name, say) comes again."""

_T = TypeVar("_T")
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_AT_ONCE, _PATIENTLY, _HELD = range(3)


class Stopped(KeyboardInterrupt):
    """A signal asked the program to stop; its exit code is the shell's for that, 128 and the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class _State:
    """The signals of this process; handlers change it between any two instructions of the main thread."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.installed: dict[int, Any] = {}  # what handled these signals before
        self.mode = _AT_ONCE
        self.received = 0
        self.acknowledged = False
        self.overdue = False  # the time of patience is over
        self.raised = -GRACE  # when
        self.updating = False  # an optimiser is writing weights
        self.news: queue.SimpleQueue[int] = queue.SimpleQueue()  # the one queue that handlers may put into

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        if os.getpid() != self.process:  # a forked child, which has parents to obey
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.acknowledged:
            if not self.received:
                self.received = number
                self.news.put(number)
            self.deliver()

    def deliver(self) -> None:
        """Raise where that may be now."""
        wait = self.mode == _HELD or self.updating or (self.mode == _PATIENTLY and not self.overdue)
        if wait or not self.received or self.acknowledged or time.monotonic() < self.raised + GRACE:
            return
        self.raised = time.monotonic()
        raise Stopped(self.received)

    def remind(self) -> None:
        """Come again, in a thread of its own, until the stop is acknowledged or the handlers are gone."""
        number = self.news.get()
        while number:
            try:
                number = self.news.get(timeout=GRACE)
            except queue.Empty:
                self.overdue = True
                if hasattr(signal, "pthread_kill"):  # wakes what waits, too
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
    """Take over the signals while the context lasts; inside another one it has no effect."""
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
        reminder.join()  # it must not signal those who come after
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
    """Let signals wait until the context ends."""
    with _mode(_HELD):
        yield
    if _state.mode != _HELD:
        check()


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Let signals interrupt what is in the context, although what is around it is held."""
    with _mode(_AT_ONCE):
        check()
        yield


def patiently(work: Callable[[], _T]) -> _T:
    """Return what ``work()`` returns; a signal interrupts it after :data:`GRACE` seconds.

    One that came while it still ended by itself waits for a :func:`check`, so that what it returned is not lost.
    """
    with _mode(_PATIENTLY):
        return work()


def check() -> None:
    """Raise :class:`Stopped` if a signal has come that nobody acknowledged, also where signals are held."""
    state = _state
    if _in_main_thread() and state.received and not state.acknowledged:
        state.raised = time.monotonic()
        raise Stopped(state.received)


def acknowledge() -> None:
    """Say that the program is about to end: no signal is raised any more."""
    if _in_main_thread():
        _state.acknowledged = True


@contextlib.contextmanager
def whole_updates() -> Iterator[Callable[[], bool]]:
    """Let signals wait for the step of any optimiser of PyTorch, which would leave weights half updated.

    Yields:
        A function that tells whether such a step has begun and not come to its end: what it was to update is then
        neither old nor new.
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
    """End the process: before a command has begun there is nothing to save, and after it nothing to say."""
    if not _begun:
        with contextlib.suppress(OSError):
            os.write(1, b"\ninterrupted before it began; nothing was written.\n")
    os._exit(128 + number)


def quit_while_starting() -> None:
    """Let signals end ``python -m grip_env.COMMAND`` in one line while it imports what it needs."""
    for number in _SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _quit)


def begin() -> None:
    """Say that a command has begun: what there is to say about it, it says from here on."""
    global _begun
    _begun = True


def end_soon(code: int, seconds: float = 5.0) -> None:
    """End the process of ``python -m grip_env.COMMAND`` that goes on after its command, once it has had some seconds.

    A thread that somebody forgot keeps Python from ending. Signals are ignored meanwhile: Python gives them back their
    default actions on its way out, by which they would replace the exit code.
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
