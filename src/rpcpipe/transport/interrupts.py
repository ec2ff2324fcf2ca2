"""Ctrl-C held back while bookkeeping must not be torn in two.

A KeyboardInterrupt can come between any two bytecodes of the main thread: between taking a sequence
number and sending the call that bears it, or at the first one of an ``__exit__``, which then does
nothing. Inside of ``with Deferred():`` it comes only where a ``with Interruptible():`` waits, or at
the end.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class _State:
    """Of the main thread, the only one that gets signals."""

    before: Any = None
    caught: tuple[int, FrameType | None] | None = None
    waiting = False


def _catch(number: int, frame: FrameType | None) -> None:
    if _State.waiting:
        _State.waiting = False
        _State.before(number, frame)
    else:
        _State.caught = number, frame


def _fire() -> None:
    """Let a Ctrl-C that was held back take effect."""
    if _State.caught is not None:
        caught, _State.caught = _State.caught, None
        _State.before(*caught)


class Deferred:
    """Runs its block whole but for its waits; a Ctrl-C in it takes effect there or at its end.

    It nests. Off the main thread, and where the program ignores SIGINT, it does nothing.
    """

    _outermost = False

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        # One call of C: a signal finds either handler, and ours only takes note.
        before = signal.signal(signal.SIGINT, _catch)
        if before is _catch:
            return
        _State.before, _State.caught = before, None
        if callable(before):
            self._outermost = True
        else:
            signal.signal(signal.SIGINT, before)

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if self._outermost:
            signal.signal(signal.SIGINT, _State.before)
            _fire()

    @staticmethod
    def check() -> None:
        """Raise now what was held back, while the block can still take back what it did."""
        if threading.current_thread() is threading.main_thread():
            _fire()


class Interruptible:
    """The waits inside of a ``Deferred``; outside of one Ctrl-C works anyway."""

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            _State.waiting = True
            if signal.getsignal(signal.SIGINT) is _catch:
                try:
                    _fire()
                except BaseException:
                    _State.waiting = False
                    raise

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if threading.current_thread() is threading.main_thread():
            _State.waiting = False
