"""Watch workers, in one place: what they report, what they print, how they die, when they fall silent.

The main thread polls while a cluster forms, so that Ctrl-C and errors surface there; then a thread
of the cluster does.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rpcpipe.cluster.process import Reader
from rpcpipe.errors import RendezvousError

# A worker sends a heartbeat this often; silence is a hang.
BEAT_SECONDS = 0.5
_TICK = 0.25
_LEAST_HEARTBEAT = BEAT_SECONDS + 4 * _TICK


def heartbeat_seconds() -> float:
    """Return the time in which a hang is noticed: ``RPCPIPE_HEARTBEAT`` seconds, or 2; infinity for 0 (never).

    Raises RendezvousError for what is no number, or shorter than the workers' heartbeats allow.
    """
    given = os.environ.get("RPCPIPE_HEARTBEAT", "2")
    try:
        seconds = float(given)
    except ValueError:
        raise RendezvousError(f"RPCPIPE_HEARTBEAT={given!r} is no number of seconds") from None
    if 0 < seconds < _LEAST_HEARTBEAT:
        raise RendezvousError(
            f"RPCPIPE_HEARTBEAT={given} is too short: workers give a sign of life every {BEAT_SECONDS} s"
        )
    return seconds if seconds > 0 else float("inf")


class Source(Protocol):
    """Has file descriptors to watch: a worker, a listener, a peer that joins."""

    def readers(self) -> Mapping[int, Reader]:
        """Return by descriptor what reads it; a reader returns messages, or None at the end."""
        ...


Event = tuple[Any, str, Any]  # (source, kind, payload)


class Monitor:
    """Collects the events of all sources, and adds ("silent", seconds) once for a worker that stops beating.

    ``silence``: seconds without a "beat" after which a source that has beaten is silent.
    """

    def __init__(self, silence: float | None = None) -> None:
        # Two ticks less, because it is checked once per tick: a hang is noticed within the heartbeat's time.
        self._silence = heartbeat_seconds() - 2 * _TICK if silence is None else silence
        self._selector = selectors.DefaultSelector()
        wake, self._waker = os.pipe()
        self._selector.register(wake, selectors.EVENT_READ, None)
        self._wake = wake
        self._beats: dict[Any, float] = {}
        self._added: deque[Source] = deque()

    def add(self, source: Source) -> None:
        """Watch ``source``, too, from the next poll on. Any thread may call this."""
        self._added.append(source)
        self.wake()

    def remove(self, source: Any) -> None:
        """Watch ``source`` no longer. To be called before its descriptors are closed, by the polling thread."""
        self._beats.pop(source, None)
        with contextlib.suppress(ValueError):
            self._added.remove(source)
        for key in list(self._selector.get_map().values()):
            if key.data is not None and key.data[0] is source:
                self._selector.unregister(key.fd)

    def poll(self, timeout: float = _TICK) -> list[Event]:
        """Return what has happened; waits for it up to ``timeout`` seconds, but one tick at most."""
        events: list[Event] = []
        while self._added:
            source = self._added.popleft()
            for fd, reader in source.readers().items():
                self._selector.register(fd, selectors.EVENT_READ, (source, reader))
        for key, _ in self._selector.select(max(0.0, min(timeout, _TICK))):
            if key.data is None:
                os.read(key.fd, 1)
                continue
            if self._selector.get_map().get(key.fd) is not key:
                continue  # removed by an earlier reader of this round; the descriptor may be another's now
            source, reader = key.data
            messages = reader()
            if messages is None:
                self._selector.unregister(key.fd)
            events += [(source, kind, payload) for kind, payload in messages or ()]
            if any(kind == "died" for kind, _ in messages or ()):
                self.remove(source)
        return events + self._silent(events)

    def _silent(self, events: Sequence[Event]) -> list[Event]:
        """Return events for the sources that were silent for too long although all that arrived has been read."""
        now = time.monotonic()
        died = {id(source) for source, kind, _ in events if kind == "died"}
        for source, kind, _ in events:
            if kind == "beat" and id(source) not in died:
                self._beats[source] = now
        silent = [source for source, last in self._beats.items() if now - last > self._silence]
        # This process may have been the one that slept: a source with something to read now is not silent.
        if silent and (waiting := self._selector.select(0)):
            heard = {id(key.data[0]) for key, _ in waiting if key.data is not None}
            silent = [source for source in silent if id(source) not in heard]
        return [(source, "silent", now - self._beats.pop(source)) for source in silent]

    def wake(self) -> None:
        """Make a ``poll`` in another thread return."""
        os.write(self._waker, b"x")

    def close(self) -> None:
        """Release the selector; no thread may be polling."""
        self._selector.close()
        os.close(self._wake)
        os.close(self._waker)
