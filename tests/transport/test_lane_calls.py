"""Calls by lane where one process takes another's place: no answer meets a call that it is not for."""

from __future__ import annotations

import gc
import pickle
import threading
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import pytest

from rpcpipe.errors import WorkerLost
from rpcpipe.transport.base import DRIVER
from rpcpipe.transport.lane_calls import ANSWER, LaneCalls
from rpcpipe.transport.lanes import Lanes
from rpcpipe.transport.replies import Replies
from rpcpipe.transport.roster import DRIVERS_SEAT, Roster, Seat
from rpcpipe.transport.served import Served
from support.faults import wait_for
from support.memory import open_files

WORKER = "worker0"
FIRST, SECOND = Seat("worker0-1", 1), Seat("worker0-2", 2)


class Process:
    """What a process has of a transport, but for RPC. It receives where the test says so."""

    def __init__(self, generation: str, name: str, worker: Seat) -> None:
        self.roster = Roster(generation, name, {DRIVER: DRIVERS_SEAT, WORKER: worker})
        self.lanes, self.replies = Lanes(self.roster), Replies()
        self.calls = LaneCalls(
            self.roster, self.lanes, self.replies, self._serve, lambda *answer: self.by_rpc.append(answer)
        )
        self.asked: list[tuple[Any, Future[Any]]] = []
        self.by_rpc: list[Any] = []
        self.received: list[str] = []
        self.lanes.serve(self._run)

    def _run(self, verb: str, args: tuple[Any, ...]) -> None:
        self.received.append(verb)
        self.calls.run(verb, args)

    def _serve(self, verb: str, args: tuple[Any, ...]) -> Future[Any]:
        answer: Future[Any] = Future()
        self.asked.append((args, answer))
        return answer

    def call(self, to: str, *args: Any) -> Future[Any]:
        reply = self.replies.open(to)
        assert self.calls.call(to, reply, "ask", args)
        return reply

    def receive(self) -> None:
        while self.lanes.receive(0.02):
            pass

    def lose(self, name: str) -> None:
        """As the transport does."""
        self.replies.lose(name, WorkerLost("gone", worker=name))
        self.lanes.lose(name)
        self.calls.lose(name)

    def admit(self, seats: Mapping[str, Seat]) -> None:
        """As the transport does."""
        self.roster.seat(seats)
        self.lanes.forget(seats)
        for name in seats:
            self.replies.forget(name)


class Group:
    """A driver, a worker that is about to die, and its successor."""

    def __init__(self) -> None:
        generation = uuid.uuid4().hex
        self.driver = Process(generation, DRIVER, FIRST)
        self.dead = Process(generation, WORKER, FIRST)
        self.successor = Process(generation, WORKER, SECOND)

    def replace(self) -> None:
        self.driver.lose(WORKER)
        self.driver.admit({WORKER: SECOND})

    def call_successor(self) -> Future[Any]:
        """Call it and let it begin."""
        reply = self.driver.call(WORKER, "for the successor")
        self.successor.receive()
        return reply

    def close(self) -> None:
        for process in (self.driver, self.dead, self.successor):
            process.lanes.close()


@pytest.fixture
def group() -> Iterator[Group]:
    group = Group()
    yield group
    group.close()


def test_a_successor_is_called_and_answers_by_lanes(group: Group) -> None:
    group.replace()
    reply = group.call_successor()
    [(args, answer)] = group.successor.asked
    assert args == ("for the successor",)
    answer.set_result("done")
    group.driver.receive()
    assert reply.result(0) == "done"
    assert not group.dead.asked
    assert not group.successor.by_rpc


def test_a_call_to_one_who_is_lost_fails_at_once_and_its_late_answer_is_nothing(group: Group) -> None:
    reply = group.driver.call(WORKER, 1)
    group.dead.receive()
    group.driver.lose(WORKER)
    with pytest.raises(WorkerLost, match="gone"):
        reply.result(0)
    group.dead.asked[0][1].set_result("too late")  # it was stopped for a while
    group.driver.receive()
    with pytest.raises(WorkerLost, match="gone"):
        reply.result(0)
    assert not group.driver.calls.call(WORKER, group.driver.replies.open(WORKER), "ask", ())


def test_what_the_dead_answer_late_completes_no_call_to_the_successor(group: Group) -> None:
    group.driver.call(WORKER, 1)
    group.driver.call(WORKER, 2)
    group.dead.receive()
    group.dead.asked[0][1].set_result("unread when it is replaced")
    group.replace()
    reply = group.call_successor()
    group.dead.asked[1][1].set_result("sent when it is replaced")
    group.driver.receive()
    assert not reply.done()
    group.successor.asked[0][1].set_result("done")
    group.driver.receive()
    assert reply.result(0) == "done"


def numbers(process: Process) -> list[int]:
    """Answer the calls that ``process`` runs, each as what no lane can take; return their numbers."""
    process.lanes.lose(DRIVER)
    process.lanes.lose(WORKER)
    for _, answer in process.asked:
        answer.set_result(None)
    process.asked.clear()
    return [number for _, number, _, _ in process.by_rpc]


def test_not_even_with_the_number_of_the_successors_call(group: Group) -> None:
    assert group.dead.lanes.reach(DRIVER)
    group.replace()
    reply = group.call_successor()
    [number] = numbers(group.successor)
    group.dead.lanes.send(DRIVER, ANSWER, (number, "", pickle.dumps("of the dead"), []))
    group.driver.receive()
    assert not reply.done()


def test_nor_by_rpc(group: Group) -> None:
    served = Served()
    served.expect(group.driver.calls, group.driver.roster)
    group.replace()
    reply = group.call_successor()
    [number] = numbers(group.successor)
    served.answer(group.dead.roster.stamp(DRIVER), number, "", "of the dead")
    stranger = Process("another generation", WORKER, SECOND)
    served.answer(stranger.roster.stamp(DRIVER), number, "", "of another generation")
    stranger.lanes.close()
    assert not reply.done()
    served.answer(group.successor.roster.stamp(DRIVER), number, "", "done")
    assert reply.result(0) == "done"


def test_who_asked_and_was_replaced_is_not_answered(group: Group) -> None:
    group.dead.call(DRIVER, 1)
    group.driver.receive()
    group.replace()
    reply = group.successor.call(DRIVER, 2)
    group.driver.receive()
    (_, for_the_dead), (_, for_the_successor) = group.driver.asked
    for_the_dead.set_result("for the dead")
    group.successor.receive()
    assert not reply.done()
    assert not group.successor.received
    assert not group.driver.by_rpc
    for_the_successor.set_result("done")
    group.successor.receive()
    assert reply.result(0) == "done"


def test_no_two_calls_of_a_group_have_one_number(group: Group) -> None:
    group.dead.call(DRIVER, 1)
    group.driver.receive()
    numbers(group.driver)
    group.replace()
    for number in range(2):
        group.successor.call(DRIVER, number)
        group.driver.call(WORKER, number)
    group.driver.receive()
    group.successor.receive()
    assert len({*numbers(group.driver), *numbers(group.successor)}) == 5


def test_a_worker_may_be_lost_while_a_call_finds_that_no_lane_takes_it(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose_meanwhile(*_: object) -> bool:
        group.driver.lose(WORKER)
        return False

    reply = group.driver.replies.open(WORKER)
    monkeypatch.setattr(Lanes, "send", lose_meanwhile)
    assert not group.driver.calls.call(WORKER, reply, "ask", ())
    with pytest.raises(WorkerLost, match="gone"):
        reply.result(0)


@pytest.mark.parametrize("who_receives", ["nobody", "another thread"])
def test_replacement_closes_the_lanes_from_and_to_the_dead(group: Group, who_receives: str) -> None:
    def receive_until_closed() -> None:
        while group.driver.lanes.listening:
            group.driver.lanes.receive(None)

    group.driver.call(WORKER, 1)
    group.dead.receive()
    group.dead.asked[0][1].set_result(1)
    group.driver.receive()
    thread = threading.Thread(target=receive_until_closed)
    if who_receives != "nobody":
        thread.start()
    gc.collect()
    before = open_files()
    group.replace()  # the dead one's ends, in this process, stay open
    wait_for(lambda: open_files() == before - 2)
    group.driver.lanes.close()
    if who_receives != "nobody":
        thread.join(5.0)
        assert not thread.is_alive()
