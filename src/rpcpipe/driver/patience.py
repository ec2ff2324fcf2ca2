"""How long the driver waits for workers that finish nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rpcpipe.errors import DeadlineExceeded
from rpcpipe.transport.base import Transport

# Seconds without a reply after which a wait asks the workers for their progress.
POLL = 1.0


class Patience:
    """Ends a wait during which no worker finishes any task for ``timeout`` seconds."""

    def __init__(self, transport: Transport, workers: Sequence[str], timeout: float) -> None:
        self._transport = transport
        self._workers = workers
        self._timeout = timeout
        self._last: dict[str, int] = {}
        self._moved = time.monotonic()

    def check(self) -> None:
        """Ask all workers for their progress; raise DeadlineExceeded if none has finished anything in time."""
        replies = {worker: self._transport.call(worker, "progress") for worker in self._workers}
        pending, until = set(replies.values()), time.monotonic() + min(POLL, self._timeout / 4)
        while pending and (left := until - time.monotonic()) > 0:
            done, pending = self._transport.wait(pending, left)
            if not done:
                break
        states = {worker: reply.result() for worker, reply in replies.items() if reply.done()}
        finished = {worker: state[0] for worker, state in states.items()}
        moved = any(self._last.get(worker, count) != count for worker, count in finished.items())
        self._last.update(finished)
        if moved:
            self._moved = time.monotonic()
        elif time.monotonic() - self._moved > self._timeout:
            now = "; ".join(
                f"{worker} {states[worker][1] if worker in states else 'does not answer'}" for worker in self._workers
            )
            raise DeadlineExceeded(
                f"no worker has finished anything for {self._timeout:g} s: {now}."
                " If an action may take that long, pass a larger timeout to rp.launch or rp.connect"
            )
