"""Track calls under way, so that each ends exactly once, by its answer or by the loss of its worker; wait for them."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from typing import Any

from rpcpipe.errors import WorkerLost
from rpcpipe.transport.interrupts import allow_interrupts, shield_interrupts
from rpcpipe.transport.owner import Owner


class Replies:
    """Pending replies by worker. Any thread may call any method.

    Invariant: whoever removes a reply from ``_pending``, under the lock, completes it, outside of the lock
    (callbacks run then). So a late answer and a loss can race without completing a future twice.
    """

    def __init__(self) -> None:
        self._owner = Owner()
        self._lock = threading.Lock()
        self._pending: dict[str, set[Future[Any]]] = {}
        self._lost: dict[str, WorkerLost] = {}

    def open(self, worker: str) -> Future[Any]:
        """Return a new reply, which has already failed if ``worker`` is lost. Raises StateError in a fork."""
        self._owner.check()
        reply: Future[Any] = Future()
        with self._lock:
            lost = self._lost.get(worker)
            if lost is None:
                self._pending.setdefault(worker, set()).add(reply)
        if lost is not None:
            reply.set_exception(lost)
        return reply

    def _is_pending(self, worker: str, reply: Future[Any]) -> bool:
        with self._lock:
            return reply in self._pending.get(worker, ())

    def complete(self, worker: str, reply: Future[Any], result: Any) -> None:
        """Set the result, unless the loss of ``worker`` came first."""
        if self._take(worker, reply):
            reply.set_result(result)

    def fail(self, worker: str, reply: Future[Any], error: Exception, *, after: float = 0.0) -> None:
        """Set the exception, unless the loss of ``worker`` came first or comes within ``after`` seconds."""
        if after and self._is_pending(worker, reply):
            late = threading.Timer(after, self.fail, (worker, reply, error))
            late.daemon = True
            late.start()
        elif self._take(worker, reply):
            reply.set_exception(error)

    def lose(self, worker: str, error: WorkerLost) -> None:
        """Fail ``worker``'s pending and future replies with ``error``; the first loss given counts."""
        with self._lock:
            self._lost.setdefault(worker, error)
            pending = self._pending.pop(worker, set())
        for reply in pending:
            reply.set_exception(error)

    def forget(self, worker: str) -> None:
        """Take calls to ``worker`` again, where another process is now; those under way to the dead one have failed."""
        with self._lock:
            self._lost.pop(worker, None)

    def _take(self, worker: str, reply: Future[Any]) -> bool:
        with self._lock:
            if reply not in self._pending.get(worker, ()):
                return False
            self._pending[worker].discard(reply)
            return True


# Seconds until a thread looks again whether messages can come, once none could.
_PAUSE = 0.05


class _Arrivals:
    """Whether one of the replies that a thread waits for has come. Not a lock, which a Ctrl-C could leave held."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake, self._thread = wake, threading.get_ident()
        self.told: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.any = self.receiving = False

    def note(self, _: object) -> None:
        """Take note of a reply that is done; any thread."""
        self.any = True
        self.told.put(None)
        # The thread sets `receiving` before it looks at `any`.
        if self.receiving and threading.get_ident() != self._thread:
            self._wake()


class Waiting:
    """Lets threads wait for replies. One of them at a time receives what comes meanwhile, by ``receive``.

    ``receive(seconds)`` returns False once its time is up, or nothing can come; ``wake`` ends it. So an answer that
    comes to the receiving thread is on no other thread's way. The others wait to be told; who stops receiving lets one
    of them go on.
    """

    def __init__(self, receive: Callable[[float], bool], wake: Callable[[], None]) -> None:
        self._owner = Owner()
        self._receive, self._wake = receive, wake
        self._receiving = threading.RLock()  # a signal's handler may wait in the thread that receives
        self._others: dict[_Arrivals, None] = {}

    def wait(self, replies: Collection[Future[Any]], timeout: float) -> tuple[set[Future[Any]], set[Future[Any]]]:
        """Wait up to ``timeout`` seconds for one of ``replies``; return (done, not done). StateError in a fork."""
        self._owner.check()
        # Not torch's Future.wait, which ignores Ctrl-C until the call ends, and not concurrent.futures.wait,
        # which a Ctrl-C can leave with the futures' locks held.
        with shield_interrupts():
            arrivals = _Arrivals(self._wake)
            for reply in replies:
                reply.add_done_callback(arrivals.note)
            try:
                self._wait(arrivals, time.monotonic() + timeout)
            finally:
                self._pass_on()
        done = {reply for reply in replies if reply.done()}
        return done, set(replies) - done

    def _wait(self, arrivals: _Arrivals, until: float) -> None:
        while not arrivals.any:
            left = until - time.monotonic()
            if not self._receiving.acquire(blocking=False):
                self._wait_to_be_told(arrivals, left)
            elif not self._receive_until(arrivals, left):
                _sleep(arrivals, min(_PAUSE, until - time.monotonic()))
            if left <= 0:
                return

    def _receive_until(self, arrivals: _Arrivals, left: float) -> bool:
        """Receive once; return False if nothing came."""
        arrivals.receiving = True
        try:
            return arrivals.any or self._receive(max(left, 0.0))
        finally:
            arrivals.receiving = False
            self._receiving.release()

    def _wait_to_be_told(self, arrivals: _Arrivals, left: float) -> None:
        self._others[arrivals] = None
        try:
            if self._receiving.acquire(blocking=False):
                self._receiving.release()  # the thread that received has stopped, and may have seen nobody to tell
            else:
                _sleep(arrivals, left)
        finally:
            del self._others[arrivals]

    def _pass_on(self) -> None:
        for other in list(self._others):
            other.told.put(None)
            return


def _sleep(arrivals: _Arrivals, left: float) -> None:
    """Wait until a reply has come, or the thread that received stops."""
    with contextlib.suppress(queue.Empty), allow_interrupts():
        arrivals.told.get(timeout=max(left, 0.0))
