"""Waits for whatever workers say, print or suffer, in one place.

Used by the main thread while a cluster forms, so that Ctrl-C and errors surface there, then by a
thread of its own.
"""

from __future__ import annotations

import os
import selectors
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rpcpipe.cluster.process import Reader

# A worker says that it lives twice a second; silence is a hang.
BEAT_SECONDS = 0.5
_TICK = 0.25
_LEAST_HEARTBEAT = BEAT_SECONDS + 4 * _TICK


def heartbeat_seconds() -> float:
    """The time within which a hang is noticed: ``RPCPIPE_HEARTBEAT`` seconds (0: never), or 2."""
    given = os.environ.get("RPCPIPE_HEARTBEAT", "2")
    try:
        seconds = float(given)
    except ValueError:
        raise ValueError(f"RPCPIPE_HEARTBEAT={given!r} is no number of seconds") from None
    if 0 < seconds < _LEAST_HEARTBEAT:
        raise ValueError(f"RPCPIPE_HEARTBEAT={given} is too short: workers give a sign of life every {BEAT_SECONDS} s")
    return seconds if seconds > 0 else float("inf")


class Source(Protocol):
    """Whatever has file descriptors to watch: a worker, a listener, a newcomer."""

    def sources(self) -> Mapping[int, Reader]: ...


Event = tuple[Any, str, Any]  # (source, kind, payload)


class Watch:
    """The events of all sources, and ("silent", seconds) once of a worker that no longer says "beat"."""

    def __init__(self, silence: float | None = None) -> None:
        # Judged at every tick: a hang is noticed within the heartbeat's time, not a tick after it.
        self._silence = heartbeat_seconds() - 2 * _TICK if silence is None else silence
        self._selector = selectors.DefaultSelector()
        wake, self._waker = os.pipe()
        self._selector.register(wake, selectors.EVENT_READ, None)
        self._wake = wake
        self._beats: dict[Any, float] = {}

    def add(self, source: Source) -> None:
        """Watch ``source`` too; from the polling thread, or before it starts."""
        for fd, reader in source.sources().items():
            self._selector.register(fd, selectors.EVENT_READ, (source, reader))

    def forget(self, source: Any) -> None:
        """Watch ``source`` no longer. Call it before its descriptors are closed."""
        self._beats.pop(source, None)
        for key in list(self._selector.get_map().values()):
            if key.data is not None and key.data[0] is source:
                self._selector.unregister(key.fd)

    def poll(self, timeout: float = _TICK) -> list[Event]:
        """What has happened, waiting up to ``timeout`` seconds for it."""
        events: list[Event] = []
        for key, _ in self._selector.select(max(0.0, min(timeout, _TICK))):
            if key.data is None:
                os.read(key.fd, 1)
                continue
            if self._selector.get_map().get(key.fd) is not key:
                continue  # forgotten by an earlier one of this round; its number may be another's now
            source, reader = key.data
            messages = reader()
            if messages is None:
                self._selector.unregister(key.fd)
            events += [(source, kind, payload) for kind, payload in messages or ()]
            if any(kind == "died" for kind, _ in messages or ()):
                self.forget(source)
        return events + self._judge(events)

    def _judge(self, events: Sequence[Event]) -> list[Event]:
        """Whoever was silent for too long although everything that arrived has been read."""
        now = time.monotonic()
        died = {id(source) for source, kind, _ in events if kind == "died"}
        for source, kind, _ in events:
            if kind == "beat" and id(source) not in died:
                self._beats[source] = now
        silent = [source for source, last in self._beats.items() if now - last > self._silence]
        # This process may have been the one that slept: only who has nothing to read now is silent.
        if silent and (waiting := self._selector.select(0)):
            heard = {id(key.data[0]) for key, _ in waiting if key.data is not None}
            silent = [source for source in silent if id(source) not in heard]
        return [(source, "silent", now - self._beats.pop(source)) for source in silent]

    def wake(self) -> None:
        """Make a ``poll`` in another thread return."""
        os.write(self._waker, b"x")

    def close(self) -> None:
        """Stop watching; nobody may be polling."""
        self._selector.close()
        os.close(self._wake)
        os.close(self._waker)
