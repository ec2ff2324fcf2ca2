"""Hold Ctrl-C back while bookkeeping must not be torn in two.

A KeyboardInterrupt can come between any two bytecodes of the main thread: between taking a sequence
number and sending the call that carries it, or at the first bytecode of an ``__exit__``, which then does
nothing. Inside ``with shield_interrupts():`` it is raised only where a ``with allow_interrupts():`` waits,
or at the end of the block.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class _State:
    """State of the main thread, the only one that receives signals."""

    handler: Any = None  # SIGINT's handler before the shield
    caught: tuple[int, FrameType | None] | None = None
    waiting = False
    shielded = False
    held = False


def _catch(number: int, frame: FrameType | None) -> None:
    if _State.waiting:
        _State.waiting = False
        _State.handler(number, frame)
    else:
        _State.caught = number, frame


def _deliver() -> None:
    """Run the former handler for a Ctrl-C that was held back, if there was one."""
    if _State.caught is not None:
        caught, _State.caught = _State.caught, None
        _State.handler(*caught)


class shield_interrupts:  # noqa: N801  # used like a function, as contextlib.suppress is
    """Run the block as a whole: a Ctrl-C in it is raised in its ``allow_interrupts`` blocks or at its end.

    Nests. Does nothing off the main thread, and where the program ignores SIGINT.
    """

    _outermost = False

    def __enter__(self) -> None:
        if _State.shielded or threading.current_thread() is not threading.main_thread():
            return
        _State.caught = None
        # One C call: a signal finds either the former handler or ours, which only takes note.
        handler = signal.signal(signal.SIGINT, _catch)
        if handler is _catch:
            return
        _State.handler = handler
        if callable(handler):
            self._outermost = _State.shielded = True
        else:
            signal.signal(signal.SIGINT, handler)

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if self._outermost:
            _State.shielded = False
            signal.signal(signal.SIGINT, _State.handler)
            _deliver()

    @staticmethod
    def check() -> None:
        """Raise a Ctrl-C that was held back now, while the block can still undo what it did."""
        if threading.current_thread() is threading.main_thread():
            _deliver()


class allow_interrupts:  # noqa: N801
    """Let Ctrl-C interrupt the block although a ``shield_interrupts`` encloses it; does nothing otherwise."""

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread() and not _State.held:
            _State.waiting = True
            if signal.getsignal(signal.SIGINT) is _catch:
                try:
                    _deliver()
                except BaseException:
                    _State.waiting = False
                    raise

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if threading.current_thread() is threading.main_thread():
            _State.waiting = False


class hold_interrupts(shield_interrupts):  # noqa: N801
    """Like ``shield_interrupts``, but a Ctrl-C is raised only after the block, whatever waits in it.

    For what cannot be stopped half way; its waits must end by themselves.
    """

    _before = False

    def __enter__(self) -> None:
        super().__enter__()
        if threading.current_thread() is threading.main_thread():
            self._before, _State.held = _State.held, True

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if threading.current_thread() is threading.main_thread():
            _State.held = self._before
        super().__exit__(kind, error, trace)
