"""One call of a pipeline at a time: the driver's bookkeeping, and each worker's sequence, have one writer.

A call from another thread waits its turn. It is held for the length of a call, and by an iterator (``train``,
``predict``) for the length of each ``next``, so other threads' calls may come in between; what an open step or iterator
cannot bear is refused by ``Runtime.enter``. Callbacks and hooks may call the pipeline again: the lock is re-entrant.
"""

from __future__ import annotations

import functools
import inspect
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

from rpcpipe.errors import StateError
from rpcpipe.transport.interrupts import shield_interrupts

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

# Seconds between two looks at a held-back Ctrl-C while a call waits.
_POLL = 0.1


class _Holder(NamedTuple):
    thread: threading.Thread
    call: str


class Turn:
    """The right to call a pipeline. A call that has waited ``timeout`` seconds for another one is refused."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._lock = threading.RLock()
        self._holder: _Holder | None = None  # says who; the lock alone says whether

    @property
    def is_elsewhere(self) -> bool:
        """Whether another thread has the turn."""
        holder = self._holder
        return holder is not None and holder.thread is not threading.current_thread()

    def run(self, call: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return ``function(…)``, called when no other thread is in a call; ``call`` names it to those that wait.

        Raises StateError, with nothing called, if a call of another thread lasts too long.
        """
        if self.is_elsewhere:
            self._wait(call)
        return self.take(call, function, *args, **kwargs)

    def take(self, call: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return ``function(…)`` like ``run``, however long another call lasts: what ends something is not refused."""
        # The lock's own C methods, between which and the block no Ctrl-C comes: it is never left held.
        with self._lock:
            outer = None if self.is_elsewhere else self._holder  # a Ctrl-C may have left another's name
            self._holder = outer or _Holder(threading.current_thread(), call)
            try:
                return function(*args, **kwargs)
            finally:
                self._holder = outer

    def _wait(self, call: str) -> None:
        """Wait until no other thread is in a call, or for the timeout."""
        until = time.monotonic() + self._timeout
        with shield_interrupts():
            while not self._lock.acquire(timeout=min(_POLL, self._timeout)):
                shield_interrupts.check()
                if time.monotonic() > until and (holder := self._holder) is not None:
                    raise StateError(
                        f"pipe.{call} in thread {threading.current_thread().name!r} has waited {self._timeout:g} s for"
                        f" pipe.{holder.call} in thread {holder.thread.name!r}, which is still under way; one thread at"
                        " a time calls a pipeline: call again when that has ended"
                    )
            self._lock.release()


def in_turn(method: F) -> F:
    """Let ``method`` of an object with a ``turn`` wait for other threads' calls of the same pipeline."""

    @functools.wraps(method)
    def waiting(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        turn: Turn = self.turn
        return turn.run(method.__name__, method, self, *args, **kwargs)

    return cast(F, waiting)


class EachInTurn(Iterator[T]):
    """Iterates over ``results``, each of which is made in one turn of ``call``.

    ``unused``: a warning for one that was made and never iterated over, so that nothing has happened.
    """

    def __init__(self, turn: Turn, call: str, results: Generator[T, Any, Any], unused: str = "") -> None:
        self._turn, self._call, self._results, self._unused = turn, call, results, unused

    def __next__(self) -> T:
        self._unused = ""
        return self._turn.run(self._call, next, self._results)

    def close(self) -> None:
        """End the iteration early."""
        self._unused = ""
        self._turn.run(self._call, self._results.close)

    def __del__(self) -> None:
        if self._unused:
            warnings.warn(self._unused, RuntimeWarning, stacklevel=2)
        elif inspect.getgeneratorstate(self._results) == inspect.GEN_SUSPENDED:
            self.close()
