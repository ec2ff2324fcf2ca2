"""What every transport promises, asked of both: torch RPC between two processes, and the in-process one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import rpcpipe as rp
from rpcpipe.errors import Failure, WorkerLost
from rpcpipe.transport import Transport
from rpcpipe.transport.base import DRIVER
from rpcpipe.transport.local import LocalTransport
from rpcpipe.transport.roster import Roster
from rpcpipe.transport.rpc import RpcTransport
from support.faults import wait_for
from support.recorder import WORKER, ask, equal, result, serve_recorder


def test_what_is_sent_is_delivered_once(transport: Transport) -> None:
    for number in range(20):
        transport.send(WORKER, "note", number)
    wait_for(lambda: len(ask(transport, "noted")) >= 20)
    assert sorted(ask(transport, "noted")) == list(range(20))


NEST = {"x": torch.ones(2, 3), "ids": torch.arange(3), "flags": [torch.tensor(True), None, 3]}
VALUES: dict[str, Callable[[], list[torch.Tensor]]] = {  # made anew: a clone would be dense
    "dense": lambda: [torch.arange(6.0).view(2, 3), torch.arange(5)],
    "large": lambda: [torch.arange(100_000.0)],
    "not-contiguous": lambda: [torch.arange(6.0).view(2, 3).t(), torch.arange(10)[::2]],
    "expanded": lambda: [torch.ones(1, 3).expand(4, 3)],
    "sparse": lambda: [torch.ones(2), torch.eye(3).to_sparse()],
    "empty": lambda: [torch.zeros(0, 3), torch.ones(2)],
    "one-number": lambda: [torch.tensor(2.5, dtype=torch.float64)],
    "none": list,
}
BY_RPC = {"sparse", "empty"}


def arrived(transport: Transport, number: int) -> list[Any]:
    wait_for(lambda: len(ask(transport, "noted")) >= number)
    notes: list[Any] = ask(transport, "noted")
    assert len(notes) == number
    return notes


def messages(values: list[torch.Tensor]) -> list[tuple[Any, ...]]:
    return [
        ("deliver", "pipe", 1, (("F", 0, 1), "input"), values),
        ("deliver_tensors", "pipe", 2, (("F", 0, 1), "input"), [True], values),
        ("supply", "pipe", 3, [values, NEST]),
        ("deliver", "pipe", 4, "x" * 70_000, values),  # longer than what a lane takes beside tensors
    ]


@pytest.mark.parametrize("made", VALUES.values(), ids=VALUES)
def test_values_for_stages_arrive_equal_once_and_as_copies(
    transport: Transport, made: Callable[[], list[torch.Tensor]]
) -> None:
    sent = made()
    for verb, *args in messages(sent):
        transport.send(WORKER, verb, *args)
    arrived(transport, 4)
    for tensor in sent:
        tensor.zero_()
    assert equal(sorted(arrived(transport, 4), key=lambda note: note[2]), messages(made()))
    for verb, *args in messages(sent := made()):
        transport.send(WORKER, verb, *args)
    arrived(transport, 8)
    ask(transport, "spoil")
    assert equal(sent, made())


def test_values_stay_as_they_came_while_others_come(transport: Transport) -> None:
    """A lane uses memory again: not that of what is kept."""
    for number in range(50):
        verb = "deliver_tensors" if number % 2 else "deliver"
        transport.send(WORKER, verb, number, [torch.full((100 * number + 1,), float(number))])
    notes = arrived(transport, 50)
    assert sorted(number for _, number, _ in notes) == list(range(50))
    assert all(torch.equal(tensor, torch.full((100 * number + 1,), float(number))) for _, number, [tensor] in notes)


@pytest.mark.parametrize("transport", ["rpc"], indirect=True)
def test_the_thread_that_receives_runs_what_came_by_a_lane(transport: Transport) -> None:
    """So the tests above are of lanes, where a lane can take the message."""
    assert transport.is_near(WORKER)
    number = 0
    for name, made in VALUES.items():
        for (verb, *args), fits in zip(messages(made()), [True, True, True, False], strict=True):
            transport.send(WORKER, verb, *args)
            number += 1
            arrived(transport, number)
            assert ask(transport, "ran_in_main_thread") == {fits and name not in BY_RPC}, (name, verb)


def test_who_receives_waits_until_it_is_woken(transport: Transport) -> None:
    outcomes: queue.SimpleQueue[bool] = queue.SimpleQueue()
    receiver = threading.Thread(target=lambda: outcomes.put(transport.receive(None)), daemon=True)
    receiver.start()
    with pytest.raises(queue.Empty):
        outcomes.get(timeout=0.05)
    transport.wake()
    assert outcomes.get(timeout=10.0)
    receiver.join(10.0)
    transport.wake()  # nobody receives: the next who does returns
    transport.wake()
    assert transport.receive(None)
    assert not transport.receive(0.0)
    assert not transport.receive(0.01)


def test_a_call_gives_the_result(transport: Transport) -> None:
    assert ask(transport, "clock") == 7
    failure = ask(transport, "fail", None)
    assert isinstance(failure, Failure)
    assert failure.message == "größer"


def test_a_call_gives_a_futures_result(transport: Transport) -> None:
    reply = transport.call(WORKER, "later", ("a", 1))
    wait_for(lambda: ask(transport, "release") == 1)
    assert result(transport, reply) == ("a", 1)


def test_what_arrives_shares_no_memory_with_what_was_sent(transport: Transport) -> None:
    sent: dict[str, Any] = {"tensor": torch.ones(3), "list": [1]}
    answer = ask(transport, "note", sent)
    sent["tensor"].add_(1)
    sent["list"].append(2)
    answer["tensor"].add_(1)
    answer["list"].append(3)
    [kept] = ask(transport, "noted")
    assert (kept["tensor"].tolist(), kept["list"]) == ([1, 1, 1], [1])
    sent_without_answer = torch.zeros(2)
    transport.send(WORKER, "note", sent_without_answer)
    wait_for(lambda: len(ask(transport, "noted")) == 2)
    sent_without_answer.add_(1)
    assert ask(transport, "noted")[1].tolist() == [0, 0]


def test_a_tensor_arrives_as_it_was(transport: Transport) -> None:
    parameter = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    sent = [parameter, parameter.detach().t(), torch.arange(10)[2:4], torch.zeros(0), torch.tensor(True)]
    for one, other in zip(ask(transport, "note", sent), sent, strict=True):
        assert torch.equal(one, other)
        assert (one.dtype, one.requires_grad) == (other.dtype, other.requires_grad)


def test_remote_keeps_the_result(transport: Transport) -> None:
    handle: Any = transport.remote(WORKER, "note", [1, 2])
    assert handle.to_here() == [1, 2]
    assert ask(transport, "noted") == [[1, 2]]


def test_remote_keeps_the_result_that_comes_later(transport: Transport) -> None:
    handle: Any = transport.remote(WORKER, "later", [3], later=True)
    wait_for(lambda: ask(transport, "release") == 1)
    assert handle.to_here() == [3]


def test_a_chained_message_gets_the_handles_values(transport: Transport) -> None:
    first: Any = transport.remote(WORKER, "later", torch.full((2,), 3.0), later=True)
    second: Any = transport.remote_chained(WORKER, "double", {"x": first})
    third: Any = transport.remote_chained(WORKER, "double", {"x": second})
    wait_for(lambda: ask(transport, "release") == 1)
    assert third.to_here().tolist() == [12, 12]
    assert second.to_here().tolist() == [6, 6]


class ReadOnceFetching:
    """Takes until a handle's value is being waited for, where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return wait_for, (is_fetching,)


def is_fetching() -> bool:
    return any("fetch" in thread.name for thread in threading.enumerate())


def test_a_chained_message_may_arrive_before_the_one_whose_value_it_takes() -> None:
    with rp.launch(workers=1, threads=1, timeout=20.0) as cluster:
        transport = cluster.transport
        cluster.call(1, serve_recorder)
        second: Any = transport.remote_chained(WORKER, "double", {"x": torch.ones(2), "late": ReadOnceFetching()})
        third: Any = transport.remote_chained(WORKER, "double", {"x": second})
        assert third.to_here(20.0).tolist() == [4, 4]
        assert second.to_here(20.0).tolist() == [2, 2]


def test_a_chained_failure_is_raised_where_it_is_fetched(transport: Transport) -> None:
    failed: Any = transport.remote_chained(WORKER, "fail", {"x": torch.ones(1)})
    chained: Any = transport.remote_chained(WORKER, "double", {"x": failed})
    for handle in (failed, chained):
        with pytest.raises(RuntimeError, match="größer"):
            handle.to_here()


def test_wait_says_what_is_done_and_what_is_not(transport: Transport) -> None:
    late = transport.call(WORKER, "later", 1)
    early = transport.call(WORKER, "clock")
    done, waiting = transport.wait([late, early], 5.0)
    assert (done, waiting) == ({early}, {late})
    assert transport.wait([late], 0.05) == (set(), {late})
    assert transport.wait([early, late], 5.0) == ({early}, {late})
    wait_for(lambda: ask(transport, "release") == 1)
    assert result(transport, late) == 1


def test_a_lost_worker_fails_pending_and_future_calls(transport: Transport) -> None:
    pending = transport.call(WORKER, "later", 1)
    assert ask(transport, "clock") == 7
    transport.lose(WORKER, WorkerLost("gone", worker=WORKER))
    transport.lose(WORKER, WorkerLost("gone again", worker=WORKER))  # the first cause counts
    for reply in (pending, transport.call(WORKER, "clock")):
        with pytest.raises(WorkerLost, match=r"gone$"):
            result(transport, reply)
    transport.send(WORKER, "note", 1)  # nobody hears it, and nothing is raised
    transport.send(WORKER, "deliver_tensors", [torch.ones(2)])
    assert not any(transport.is_near(WORKER) for _ in range(20))


def test_nobody_is_near_whom_nobody_serves(transport: Transport) -> None:
    assert not any(transport.is_near("worker7") for _ in range(20))
    assert any(transport.is_near(WORKER) for _ in range(20))


def test_leaving_ends_the_wait_of_who_receives() -> None:
    """Of the in-process transport; ``test_lane_receiver`` has the other."""
    local = LocalTransport()
    receiver = threading.Thread(target=local.receive, args=(None,), daemon=True)
    receiver.start()
    local.leave()
    receiver.join(10.0)
    assert not receiver.is_alive()
    assert not local.receive(None)


@pytest.mark.parametrize("transport", ["rpc"], indirect=True)  # in one process there is one generation
def test_messages_of_another_generation_are_dropped(transport: Transport) -> None:
    assert isinstance(transport, RpcTransport)
    stranger = RpcTransport(Roster("another generation", DRIVER, transport.roster.seats))  # it reaches the same worker
    stranger.send(WORKER, "note", 1)
    assert stranger.call(WORKER, "note", 2).result(5) is None
    assert ask(transport, "noted") == []


def test_what_cannot_be_pickled_is_refused_where_it_is_sent(transport: Transport) -> None:
    with pytest.raises(Exception, match="pickle"):
        transport.call(WORKER, "note", lambda: 1)
