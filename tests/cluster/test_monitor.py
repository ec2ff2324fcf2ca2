from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping

import pytest

from rpcpipe.cluster.control_channel import Message
from rpcpipe.cluster.monitor import Monitor, heartbeat_seconds
from rpcpipe.errors import RendezvousError

pytestmark = pytest.mark.alone


class Fake:
    """A source whose messages the test writes; one byte in its pipe per message."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()
        self.messages: list[Message] = []

    def say(self, kind: str, payload: object = None) -> None:
        self.messages.append((kind, payload))
        os.write(self.writing, b"x")

    def readers(self) -> Mapping[int, Callable[[], list[Message] | None]]:
        return {self.reading: self._read}

    def _read(self) -> list[Message] | None:
        os.read(self.reading, 1)
        return [self.messages.pop(0)]

    def close(self) -> None:
        os.close(self.reading)
        os.close(self.writing)


def kinds(monitor: Monitor, source: Fake, seconds: float = 0.0) -> list[str]:
    until, found = time.monotonic() + seconds, []
    while not found or time.monotonic() < until:
        events = monitor.poll(0.01)
        assert all(event[0] is source for event in events)
        found += [kind for _, kind, _ in events]
        if not events and time.monotonic() >= until:
            break
    return found


def test_silence_is_noticed_once_and_only_of_who_has_spoken() -> None:
    monitor, source = Monitor(0.1), Fake()
    monitor.add(source)
    assert kinds(monitor, source, 0.2) == []  # it may still be starting
    source.say("beat")
    assert kinds(monitor, source, 0.5) == ["beat", "silent"]
    source.say("beat")
    assert kinds(monitor, source) == ["beat"]
    monitor.remove(source)
    monitor.close()
    source.close()


def test_a_monitor_that_slept_itself_calls_nobody_silent() -> None:
    monitor, source = Monitor(0.1), Fake()
    monitor.add(source)
    source.say("beat")
    assert kinds(monitor, source) == ["beat"]
    source.say("beat")
    source.say("beat")
    time.sleep(0.2)  # this process was busy; two beats lie in the pipe, one is read per poll
    assert kinds(monitor, source, 0.05) == ["beat", "beat"]
    monitor.close()
    source.close()


def test_the_dead_are_not_heard_again() -> None:
    monitor, source = Monitor(0.1), Fake()
    monitor.add(source)
    source.say("beat")
    source.say("died", "was killed")
    source.say("beat")
    assert kinds(monitor, source, 0.3) == ["beat", "died"]
    monitor.close()
    source.close()


def test_wake_ends_a_poll() -> None:
    monitor = Monitor(float("inf"))
    monitor.wake()
    start = time.monotonic()
    assert monitor.poll(0.2) == []
    assert time.monotonic() - start < 0.2
    monitor.close()


def test_the_heartbeat_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    assert heartbeat_seconds() == 2.0
    monkeypatch.setenv("RPCPIPE_HEARTBEAT", "30")
    assert heartbeat_seconds() == 30.0
    monkeypatch.setenv("RPCPIPE_HEARTBEAT", "0")
    assert heartbeat_seconds() == float("inf")
    for wrong in ("0.1", "soon"):
        monkeypatch.setenv("RPCPIPE_HEARTBEAT", wrong)
        with pytest.raises(RendezvousError, match="RPCPIPE_HEARTBEAT"):
            heartbeat_seconds()
