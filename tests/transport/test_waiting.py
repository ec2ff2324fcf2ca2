"""Threads that wait for replies, and the one of them that receives."""

from __future__ import annotations

import os
import queue
import signal
import threading
from concurrent.futures import Future
from typing import Any

import pytest

from rpcpipe.transport.replies import Waiting
from support.faults import wait_for


class Line:
    """What a receiver has: messages are replies to complete, None is a wake."""

    def __init__(self) -> None:
        self.messages: queue.SimpleQueue[Future[Any] | None] = queue.SimpleQueue()
        self.received_by: list[int] = []
        self.receiving = 0
        self.open = True

    def receive(self, seconds: float) -> bool:
        self.receiving += 1
        if not self.open:
            return False
        try:
            message = self.messages.get(timeout=seconds)
        except queue.Empty:
            return False
        if message is not None:
            self.received_by.append(threading.get_ident())
            message.set_result("received")
        return True

    def wake(self) -> None:
        self.messages.put(None)


@pytest.fixture
def line() -> Line:
    return Line()


@pytest.fixture
def waiting(line: Line) -> Waiting:
    return Waiting(line.receive, line.wake)


class Waiter:
    """A thread that waits for a reply of its own."""

    def __init__(self, waiting: Waiting, seconds: float = 10.0) -> None:
        self.reply: Future[Any] = Future()
        self.outcome: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self.thread = threading.Thread(
            target=lambda: self.outcome.put(bool(waiting.wait([self.reply], seconds)[0])), daemon=True
        )
        self.thread.start()


def test_the_thread_that_waits_receives_its_answer(line: Line, waiting: Waiting) -> None:
    reply: Future[Any] = Future()
    other: Future[Any] = Future()
    line.messages.put(other)
    line.messages.put(reply)
    assert waiting.wait([reply], 10.0) == ({reply}, set())
    assert other.done()
    assert set(line.received_by) == {threading.get_ident()}


def test_an_answer_that_another_thread_has_wakes_who_receives(line: Line, waiting: Waiting) -> None:
    waiter = Waiter(waiting)
    wait_for(lambda: line.receiving == 1)
    waiter.reply.set_result(1)
    assert waiter.outcome.get(timeout=5.0)


def test_who_stops_receiving_lets_another_go_on(line: Line, waiting: Waiting) -> None:
    first = Waiter(waiting)
    wait_for(lambda: line.receiving == 1)
    others = [Waiter(waiting) for _ in range(3)]
    line.messages.put(first.reply)
    assert first.outcome.get(timeout=5.0)
    for waiter in reversed(others):
        line.messages.put(waiter.reply)
        assert waiter.outcome.get(timeout=5.0)
    assert all(waiter.reply.done() for waiter in others)


def test_who_receives_passes_on_the_answers_of_others(line: Line, waiting: Waiting) -> None:
    first = Waiter(waiting)
    wait_for(lambda: line.receiving == 1)
    second = Waiter(waiting)
    line.messages.put(second.reply)
    assert second.outcome.get(timeout=5.0)
    assert line.received_by == [first.thread.ident]
    line.messages.put(first.reply)
    assert first.outcome.get(timeout=5.0)


def test_time_ends_a_wait_and_none_is_needed_for_what_is_done(line: Line, waiting: Waiting) -> None:
    reply: Future[Any] = Future()
    assert waiting.wait([reply], 0.05) == (set(), {reply})
    reply.set_result(1)
    assert waiting.wait([reply], 0.0) == ({reply}, set())


def test_where_nothing_can_come_others_still_answer(line: Line, waiting: Waiting) -> None:
    line.open = False
    waiter = Waiter(waiting)
    late = Waiter(waiting, 0.3)
    assert not late.outcome.get(timeout=5.0)
    assert line.receiving < 60  # it does not ask again and again
    waiter.reply.set_result(1)
    assert waiter.outcome.get(timeout=5.0)


def test_ctrl_c_ends_a_wait_and_another_can_follow(line: Line, waiting: Waiting) -> None:
    """Of the real receiver: ``test_lane_receiver``; here of a thread that waits beside another one."""
    receiver = Waiter(waiting)
    wait_for(lambda: line.receiving == 1)
    reply: Future[Any] = Future()
    interrupt = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        waiting.wait([reply], 10.0)
    interrupt.join()
    line.messages.put(receiver.reply)
    assert receiver.outcome.get(timeout=5.0)
    line.messages.put(reply)
    assert waiting.wait([reply], 10.0) == ({reply}, set())


def test_a_signals_handler_may_wait_in_the_thread_that_receives(line: Line, waiting: Waiting) -> None:
    within: Future[Any] = Future()
    outcomes = []

    def handle(*_: object) -> None:
        line.messages.put(within)
        outcomes.append(waiting.wait([within], 5.0)[0] == {within})

    former = signal.signal(signal.SIGUSR1, handle)
    try:
        kill = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
        kill.start()
        reply: Future[Any] = Future()
        assert waiting.wait([reply], 0.3) == (set(), {reply})
        kill.join()
    finally:
        signal.signal(signal.SIGUSR1, former)
    assert outcomes == [True]
