"""Calls that may go by a lane, promised by both transports."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed import autograd as dist_autograd

from rpcpipe.errors import WorkerLost
from rpcpipe.transport import Transport
from rpcpipe.transport.base import DRIVER
from rpcpipe.transport.local import LocalTransport
from rpcpipe.transport.roster import Roster
from rpcpipe.transport.rpc import RpcTransport
from support.faults import wait_for
from support.recorder import WORKER, OpensNowhere, ask, equal, result

ASKED: dict[str, Callable[[], Any]] = {
    "small": lambda: {"a": [1, (2, "b")], "c": None},
    "long": lambda: "x" * 70_000,
    "tensors": lambda: [torch.arange(3.0), torch.eye(2).to_sparse()],
}


@pytest.mark.parametrize("made", ASKED.values(), ids=ASKED)
def test_a_task_gives_its_result_now_or_later(transport: Transport, made: Callable[[], Any]) -> None:
    assert equal(ask(transport, "submit", "note", made()), made())
    later = transport.call(WORKER, "submit", "later", made())
    assert equal(ask(transport, "submit", "note", 1), 1)
    assert not later.done()
    wait_for(lambda: ask(transport, "release") == 1)
    assert equal(result(transport, later), made())


@pytest.mark.parametrize("transport", ["rpc"], indirect=True)
def test_tasks_go_by_a_lane_unless_they_have_tensors_or_are_long(transport: Transport) -> None:
    for name, made in ASKED.items():
        ask(transport, "submit", "note", made())
        assert ask(transport, "ran_in_main_thread") == {name == "small"}


@pytest.mark.parametrize("transport", ["rpc"], indirect=True)
def test_tasks_sent_in_an_autograd_context_make_it_known(transport: Transport) -> None:
    for within in (lambda: dist_autograd.context(), transport.context):  # the user's, and rpcpipe's
        with within() as context_id:
            assert ask(transport, "submit", "knows", context_id)
        assert ask(transport, "ran_in_main_thread") == {False}
        assert ask(transport, "submit", "note", 1)
        assert ask(transport, "ran_in_main_thread") == {True}


def test_an_answer_that_cannot_be_sent_is_an_error_where_it_is_awaited(transport: Transport) -> None:
    for what, why in (("unpicklable", "pickle"), ("opens nowhere", "no number")):
        with pytest.raises(Exception, match=why):
            ask(transport, "submit", "make", what)
    assert ask(transport, "submit", "make", "long") == "x" * 70_000
    with pytest.raises(Exception, match="pickle"):
        transport.call(WORKER, "submit", "note", lambda: 1)


def test_a_task_whose_arguments_cannot_be_read_is_an_error_where_it_is_awaited(transport: Transport) -> None:
    with pytest.raises(Exception, match="no number"):
        ask(transport, "submit", "note", OpensNowhere())
    assert ask(transport, "submit", "note", 1) == 1


def test_a_lost_worker_fails_tasks_at_once_however_they_went(transport: Transport) -> None:
    pending = [transport.call(WORKER, "submit", "later", made()) for made in ASKED.values()]
    assert ask(transport, "clock") == 7
    lose = threading.Timer(0.05, transport.lose, (WORKER, WorkerLost("gone", worker=WORKER)))
    lose.start()
    lose.join() if isinstance(transport, LocalTransport) else None  # where one thread does all
    for reply in pending:
        with pytest.raises(WorkerLost, match="gone"):
            result(transport, reply)
    lose.join()


@pytest.mark.parametrize("transport", ["rpc"], indirect=True)  # the other runs all in one thread
def test_threads_may_wait_at_once(transport: Transport) -> None:
    outcomes: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()

    def ask_often(own: int) -> None:
        for number in range(30):
            verb, *args = ("submit", "note", (own, number)) if number % 2 else ("note", (own, number))
            outcomes.put((own, ask(transport, verb, *args) == (own, number)))

    threads = [threading.Thread(target=ask_often, args=(own,)) for own in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20.0)
    assert sorted(outcomes.get(timeout=0) for _ in range(120)) == [(own, True) for own in range(4) for _ in range(30)]


@pytest.mark.parametrize("transport", ["rpc"], indirect=True)
def test_tasks_of_another_generation_are_dropped(transport: Transport) -> None:
    assert isinstance(transport, RpcTransport)
    stranger = RpcTransport(Roster("another generation", DRIVER, transport.roster.seats))  # it reaches the same worker
    assert result(stranger, stranger.call(WORKER, "submit", "note", 2)) is None
    assert ask(transport, "noted") == []
