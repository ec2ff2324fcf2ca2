"""When the compute thread wakes."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from rpcpipe.schedules import Action
from rpcpipe.worker.executor import Executor
from rpcpipe.worker.messages import Port, Route
from rpcpipe.worker.operations import RunAction, Task


class Bell:
    """A transport that counts how often the compute thread is woken."""

    def __init__(self) -> None:
        self.rung = 0

    def wake(self) -> None:
        self.rung += 1

    def receive(self, timeout: float | None) -> bool:
        """Let things happen where the compute thread would sleep."""
        if timeout is None:
            self.asleep()
        return timeout is None

    def asleep(self) -> None:
        raise NotImplementedError

    def since(self) -> int:
        rung, self.rung = self.rung, 0
        return rung


def port(chunk: int, slot: str = "input") -> Port:
    return Port(Action("F", 0, chunk), slot)


def task(chunk: int, *awaits: Port) -> Task:
    return Task(RunAction(Route(Action("F", 0, chunk), (), ())), awaits)


@pytest.fixture
def bell() -> Bell:
    return Bell()


@pytest.fixture
def executor(bell: Bell) -> Executor:
    transport: Any = bell
    executor = Executor("worker0", transport, device=torch.device("cpu"), threads=1)
    executor.create("pipeline", b"")
    bell.since()
    return executor


def test_calls_that_are_issued_ahead_wake_nobody(executor: Executor, bell: Bell) -> None:
    for place in (3, 1, 2):
        executor.accept("pipeline", 0, place, [task(place)])
    assert bell.since() == 0
    executor.accept("pipeline", 0, 0, [task(0)])
    assert bell.since() == 1


def test_values_wake_with_the_last_that_the_next_task_lacks(executor: Executor, bell: Bell) -> None:
    executor.deliver("pipeline", 0, port(0), "x")
    executor.deliver("pipeline", 0, port(1), "early")
    assert bell.since() == 0
    executor.accept("pipeline", 0, 0, [task(0, port(0), port(0, "target")), task(1, port(1))])
    assert bell.since() == 1  # not ready; but the next, so there may be something to prepare
    executor.supply("pipeline", 0, [(port(2), "z")])
    assert bell.since() == 0
    executor.supply("pipeline", 0, [(port(0, "target"), "y")])
    assert bell.since() == 1


def test_what_follows_cancelled_places_wakes(executor: Executor, bell: Bell) -> None:
    executor.cancel("pipeline", 0, 0, 4)
    assert bell.since() == 1
    executor.accept("pipeline", 1, 5, [task(1)])
    assert bell.since() == 0
    executor.accept("pipeline", 1, 4, [task(0)])
    assert bell.since() == 1


def test_a_failure_wakes_those_who_wait_for_values(executor: Executor, bell: Bell) -> None:
    executor.accept("pipeline", 0, 0, [task(0, port(0))])
    bell.since()
    executor.abandon("pipeline", 0, 0)
    assert bell.since() == 1


class Prepares:
    """An actor that is asked for idle work."""

    def __init__(self) -> None:
        self.asked: list[Action | None] = []

    def idle_work(self, awaited: Action | None) -> bool:
        self.asked.append(awaited)
        return False


def test_a_backward_that_becomes_the_next_is_prepared(executor: Executor, bell: Bell) -> None:
    actor: Any = Prepares()
    executor.actors["pipeline"] = actor
    backward = Action("B", 0, 3)
    happens = iter([
        lambda: executor.accept("pipeline", 0, 1, [task(1)]),
        lambda: executor.accept("pipeline", 0, 0, [Task(RunAction(Route(backward, (), ())), (port(3),))]),
        executor.close,
    ])  # fmt: skip
    bell.asleep = lambda: next(happens)()  # type: ignore[method-assign]
    interval = sys.getswitchinterval()
    try:
        executor.serve()
    finally:
        sys.setswitchinterval(interval)
    assert actor.asked == [None, backward]
