"""The receiving end of lanes, in the thread that the test chooses."""

from __future__ import annotations

import os
import resource
import signal
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from rpcpipe.transport import lane_receiver
from rpcpipe.transport.interrupts import shield_interrupts
from rpcpipe.transport.lanes import Lanes
from rpcpipe.transport.roster import Roster, Seat
from support.faults import wait_for
from support.memory import lane_slots


def test_waking_is_not_lost_and_time_ends_a_wait() -> None:
    lanes = Lanes(Roster(uuid.uuid4().hex, "here", {"here": Seat("here-1", 1)}))
    lanes.serve(lambda verb, args: None)
    assert not lanes.receive(0.0)
    lanes.wake()
    lanes.wake()
    assert lanes.receive(None)
    assert not lanes.receive(0.01)
    lanes.close()
    assert not lanes.receive(None)


def test_what_the_dead_have_sent_is_not_received_once_they_are_replaced() -> None:
    generation, seats = uuid.uuid4().hex, {"here": Seat("here-1", 1), "there": Seat("there-2", 2)}
    dead, receiving = Roster(generation, "here", seats), Roster(generation, "there", seats)
    successor = Roster(generation, "here", {**seats, "here": Seat("here-3", 3)})
    received: list[Any] = []
    there, first, second = Lanes(receiving), Lanes(dead), Lanes(successor)
    there.serve(lambda verb, args: received.append(args))
    assert first.send("there", "note", (1,))
    while not received:
        there.receive(1.0)
    assert first.send("there", "note", (2,))
    receiving.seat({"here": Seat("here-3", 3)})
    assert second.send("there", "note", (3,))
    while there.receive(0.05):
        pass
    assert received == [(1,), (3,)]
    for one in (there, first, second):
        one.close()


class Apart:
    """Both ends in this process, which receives where the test says so."""

    def __init__(self) -> None:
        generation, seats = uuid.uuid4().hex, {"here": Seat("here-1", 1), "there": Seat("there-2", 2)}
        self.here, self.there = (Lanes(Roster(generation, name, seats)) for name in seats)
        self.received: list[Any] = []
        self.there.serve(lambda verb, args: self.received.append(args))

    def receive(self, count: int) -> list[Any]:
        """Receive until ``count`` messages have come."""
        wait_for(lambda: (self.there.receive(0.1), len(self.received) >= count)[1])
        return self.received


@pytest.fixture
def apart() -> Iterator[Apart]:
    apart = Apart()
    yield apart
    apart.here.close()
    apart.there.close()


@contextmanager
def no_descriptor_free() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_lane_that_finds_no_descriptor_waits_and_loses_nothing(
    apart: Apart, caplog: pytest.LogCaptureFixture
) -> None:
    assert apart.here.send("there", "note", (1,))
    with no_descriptor_free():
        for _ in range(3):
            apart.there.receive(0.01)
        assert not apart.received
        assert "ulimit -n" in caplog.text
        assert len(caplog.records) <= 4  # it does not try again and again
    assert apart.receive(1) == [(1,)]
    assert apart.here.send("there", "note", (torch.ones(2),))
    assert apart.receive(2)[1][0].tolist() == [1.0, 1.0]


def test_a_slot_whose_descriptor_is_lost_is_given_up(apart: Apart, caplog: pytest.LogCaptureFixture) -> None:
    assert apart.here.send("there", "note", (0,))
    apart.receive(1)
    before = lane_slots()  # a test before may have left some to the collector
    assert apart.here.send("there", "note", (torch.ones(1 << 18),))
    with no_descriptor_free():
        assert apart.there.receive(5.0)
    assert "no descriptor is free" in caplog.text
    assert len(apart.received) == 1
    for number in range(3):
        assert apart.here.send("there", "note", (torch.full((1 << 18,), float(number)),))
        [received] = apart.receive(2 + number)[-1]
        assert (received == number).all()
    del received
    held = 2 * 3 * ((1 << 20) + lane_receiver.FLAG_BYTES)  # three slots, mapped at both ends, and not what was lost
    assert sum(size for slot, size in lane_slots().items() if slot not in before) == held


def test_ctrl_c_ends_a_wait_for_messages_and_loses_none(apart: Apart) -> None:
    assert not apart.there.receive(0.0, interruptible=True)
    interrupt = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt), shield_interrupts():
        apart.there.receive(10.0, interruptible=True)
    interrupt.join()
    assert apart.here.send("there", "note", (1,))
    assert apart.receive(1) == [(1,)]


def test_a_signals_handler_may_receive_or_close_while_the_thread_receives(apart: Apart) -> None:
    def handle(*_: object) -> None:
        if not apart.received:
            assert apart.here.send("there", "note", (1,))
            apart.receive(1)
        else:
            apart.there.close()

    former = signal.signal(signal.SIGUSR1, handle)
    try:
        for outcome in ([(1,)], [(1,)]):
            kill = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
            kill.start()
            with shield_interrupts():
                assert not apart.there.receive(0.3, interruptible=True)
            kill.join()
            assert apart.received == outcome
    finally:
        signal.signal(signal.SIGUSR1, former)
    assert not apart.there.listening
