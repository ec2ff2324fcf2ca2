"""Distributed-autograd contexts, of which a thread is in one at a time: who is in another is told, not torch's way."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType

from rpcpipe.errors import StateError


class Contexts(threading.local):
    """Makes this thread's contexts by torch's ``make``. ``current()`` is the id of the one that it is in, or None.

    One that was entered and that nobody can leave any more, as its owner is gone, is left before the next is made.
    """

    def __init__(
        self,
        make: Callable[[], AbstractContextManager[int]],
        current: Callable[[], int | None],
        release: Callable[[int], None],
    ) -> None:
        self._make, self._current, self._release = make, current, release
        self._last: Callable[[], _Context | None] = lambda: None
        self._number = -1

    def new(self) -> AbstractContextManager[int]:
        """Return a context to enter. Raises StateError if the thread is in one."""
        current = self._current()
        if current is not None and self._last() is None and current == self._number:
            self._release(self._number)
        elif current is not None:
            raise StateError(
                f"thread {threading.current_thread().name!r} is in a distributed-autograd context already, your own or"
                " that of a step of another pipeline, and torch does not nest them: leave it first, or open this step"
                " in another thread"
            )
        context = _Context(self._make(), self)
        self._last = weakref.ref(context)
        return context

    def entered(self, number: int) -> None:
        """Note the number of the context made last."""
        self._number = number


class _Context:
    def __init__(self, inner: AbstractContextManager[int], contexts: Contexts) -> None:
        self._inner, self._contexts = inner, contexts

    def __enter__(self) -> int:
        number = self._inner.__enter__()
        self._contexts.entered(number)
        return number

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inner.__exit__(kind, error, trace)
