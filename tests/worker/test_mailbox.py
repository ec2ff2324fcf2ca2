from __future__ import annotations

import itertools
import random
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from rpcpipe.errors import Failure
from rpcpipe.schedules import Action
from rpcpipe.worker.mailbox import Entry, Mailbox
from rpcpipe.worker.messages import Port, Route
from rpcpipe.worker.operations import RunAction, Task


def port(chunk: int, slot: str = "input") -> Port:
    return Port(Action("F", 0, chunk), slot)


def entry(step: int, chunk: int, *awaits: Port) -> Entry:
    return Entry(step, Task(RunAction(Route(Action("F", 0, chunk), (), ())), awaits))


def drain(box: Mailbox) -> list[int]:
    order = []
    while (taken := box.take()) is not None:
        assert isinstance(taken.task.operation, RunAction)
        order.append(taken.task.operation.route.action.chunk)
    return order


@given(st.integers(0, 2**32), st.integers(1, 30))
def test_any_order_of_arrival_gives_the_sequence(seed: int, count: int) -> None:
    box, shuffle = Mailbox(), random.Random(seed)
    messages = [("task", place) for place in range(count)] + [("value", place) for place in range(count)]
    shuffle.shuffle(messages)
    order: list[int] = []
    for kind, place in messages:
        if kind == "task":
            box.submit(place, [entry(0, place, port(place))])
        else:
            box.put(0, port(place), place)
        order += drain(box)
    assert order == list(range(count))


def test_a_task_waits_for_all_its_values_and_gets_them() -> None:
    box = Mailbox()
    box.submit(0, [entry(3, 0, port(0), port(0, "target"))])
    box.put(3, port(0), "x")
    assert box.take() is None
    assert "waits for the target of" in box.waiting_for()
    box.put(4, port(0, "target"), "another step's")
    assert box.take() is None
    box.put(3, port(0, "target"), "y")
    taken = box.take()
    assert taken is not None
    assert taken.values == {"input": "x", "target": "y"}


def test_a_failed_step_drains_without_its_values_and_spares_the_next() -> None:
    box = Mailbox()
    failure = Failure.cancel("worker0", "forward")
    box.submit(0, [entry(0, 0, port(0)), entry(0, 1, port(1)), entry(1, 2)])
    box.fail(0, failure)
    box.put(0, port(0), "late")
    assert [box.take().failure for _ in range(3)] == [failure, failure, None]  # type: ignore[union-attr]


def test_cancel_drops_what_waits_and_refuses_what_comes_late() -> None:
    box = Mailbox()
    waiting = entry(0, 0, port(0))
    box.submit(0, [waiting])
    box.submit(5, [entry(1, 5)])
    assert box.cancel(0, 0, 5) == [waiting]
    late = entry(0, 3)
    assert box.submit(3, [late]) == [late]
    box.put(0, port(0), "of a step that is over")
    assert drain(box) == [5]
    assert not box._inbox


def test_what_comes_before_a_cancelled_step_still_runs_in_any_order_of_arrival() -> None:
    """Place 0: a call between steps (an undo, say); 1 and 2: a step that is cancelled; 3: what follows."""
    for order in itertools.permutations(range(5)):
        box = Mailbox()
        arrivals: list[Callable[[], object]] = [
            lambda box=box: box.submit(0, [entry(-1, 0)]),
            lambda box=box: box.submit(1, [entry(7, 1)]),
            lambda box=box: box.submit(2, [entry(7, 2)]),
            lambda box=box: box.submit(3, [entry(-1, 3)]),
            lambda box=box: box.cancel(7, 1, 3),
        ]
        done: list[int] = []
        for index in order:
            arrivals[index]()
            if index != 4:
                continue
            done += drain(box)
        done += drain(box)
        assert done == [0, 3], order


def test_waiting_for_names_the_gap() -> None:
    box = Mailbox()
    assert box.waiting_for() == ""
    box.submit(2, [entry(0, 2)])
    assert "call 0, which has not arrived" in box.waiting_for()
