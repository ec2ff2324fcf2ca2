"""Track calls under way, so that each ends exactly once: by its answer or by the loss of its worker."""

from __future__ import annotations

import queue
import threading
from collections.abc import Collection
from concurrent.futures import Future
from typing import Any

from rpcpipe.errors import WorkerLost
from rpcpipe.transport.interrupts import allow_interrupts, shield_interrupts


class Replies:
    """Pending replies by worker. Any thread may call any method.

    Invariant: whoever removes a reply from ``_pending``, under the lock, completes it, outside of the lock
    (callbacks run then). So a late answer and a loss can race without completing a future twice.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: dict[str, set[Future[Any]]] = {}
        self._lost: dict[str, WorkerLost] = {}

    def open(self, worker: str) -> Future[Any]:
        """Return a new reply, which has already failed if ``worker`` is lost."""
        reply: Future[Any] = Future()
        with self._lock:
            lost = self._lost.get(worker)
            if lost is None:
                self._pending.setdefault(worker, set()).add(reply)
        if lost is not None:
            reply.set_exception(lost)
        return reply

    def is_pending(self, worker: str, reply: Future[Any]) -> bool:
        """Return whether ``reply`` still waits for its answer."""
        with self._lock:
            return reply in self._pending.get(worker, ())

    def complete(self, worker: str, reply: Future[Any], result: Any) -> None:
        """Set the result, unless the loss of ``worker`` came first."""
        if self._take(worker, reply):
            reply.set_result(result)

    def fail(self, worker: str, reply: Future[Any], error: Exception) -> None:
        """Set the exception, unless the loss of ``worker`` came first."""
        if self._take(worker, reply):
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


def wait(replies: Collection[Future[Any]], timeout: float) -> tuple[set[Future[Any]], set[Future[Any]]]:
    """Wait up to ``timeout`` seconds for one of ``replies``; return (done, not done)."""
    # Not torch's Future.wait, which ignores Ctrl-C until the call ends, and not concurrent.futures.wait,
    # which a Ctrl-C can leave with the futures' locks held. A SimpleQueue cannot be torn.
    first: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
    with shield_interrupts():
        for reply in replies:
            reply.add_done_callback(first.put)
    try:
        with allow_interrupts():
            first.get(timeout=timeout)
    except queue.Empty:
        pass
    done = {reply for reply in replies if reply.done()}
    return done, set(replies) - done
