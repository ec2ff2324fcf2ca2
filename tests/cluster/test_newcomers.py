"""Ranks that come to a group that is complete: who may wait, and who is sent away."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from rpcpipe.cluster import authentication
from rpcpipe.cluster.control_channel import Channel
from rpcpipe.cluster.newcomers import Newcomers
from rpcpipe.cluster.remote_worker import RemoteWorker


class Peers:
    """Makes connections; ``agents`` are the far ends."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def pair(self) -> tuple[Channel, Channel]:
        ours, theirs = (Channel(self._stack.enter_context(one)) for one in socket.socketpair())
        return ours, theirs


@pytest.fixture
def peers() -> Iterator[Peers]:
    with ExitStack() as stack:
        yield Peers(stack)


def hello(rank: int, **changes: Any) -> dict[str, Any]:
    return {"rank": rank, "host": "there", "pid": 7, "gpus": 0, "versions": authentication.versions(), **changes}


def heard(channel: Channel) -> tuple[str, Any]:
    return channel.next(time.monotonic() + 5.0)


def test_a_rank_waits_under_a_name_of_its_own_until_it_is_taken(peers: Peers) -> None:
    newcomers = Newcomers(2)
    members = [newcomers.come(hello(rank), peers.pair()[0], []) for rank in (5, 6, 9)]
    first, second, third = (member for member in members if member is not None)
    assert [first.name, second.name, third.name, third.domain] == ["spare2", "spare3", "spare4", "there#9"]
    assert newcomers.discard(second)
    assert not newcomers.discard(second)
    assert newcomers.waiting == 2
    assert newcomers.take() == [first, third]
    assert (newcomers.take(), newcomers.discard(first)) == ([], False)


def test_it_is_told_to_wait_and_in_the_end_to_stop(peers: Peers) -> None:
    newcomers, (ours, theirs) = Newcomers(0), peers.pair()
    newcomers.come(hello(1), ours, [])
    assert heard(theirs) == ("wait", None)
    newcomers.close()
    assert heard(theirs) == ("stop", None)
    late, lates = peers.pair()
    assert newcomers.come(hello(2), late, []) is None
    assert heard(lates) == ("abort", "the driver is closing; rank 2 (there:7) is late")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 1}, "the group is complete and its rank 1 lives, on here"),
        ({"rank": 4}, "the group is complete and its rank 4 lives, on there"),
        ({"rank": 0}, "RANK=0 is the driver's"),
        ({"versions": {**authentication.versions(), "torch": "1.0"}}, "has other versions: torch 1.0 there"),
    ],
)
def test_who_cannot_join_is_sent_away(peers: Peers, changes: dict[str, Any], words: str) -> None:
    newcomers = Newcomers(0)
    member = RemoteWorker("worker0", hello(1, host="here"), peers.pair()[0])
    newcomers.come(hello(4), peers.pair()[0], [member])
    ours, theirs = peers.pair()
    assert newcomers.come({**hello(5), **changes}, ours, [member, "a process of this host"]) is None
    kind, complaint = heard(theirs)
    assert kind == "abort"
    assert words in complaint
    with pytest.raises(EOFError):
        heard(theirs)
    assert newcomers.waiting == 1


def test_a_rank_whose_idle_worker_has_ended_waits_again_if_its_agent_lives(peers: Peers) -> None:
    newcomers, (ours, theirs) = Newcomers(3), peers.pair()
    member = RemoteWorker("spare0", hello(1), ours)
    again = newcomers.come_again(member)
    assert again is not None
    assert (again.name, again.rank, again.channel, newcomers.waiting) == ("spare3", 1, ours, 1)
    assert again.start({"name": "spare3"}) is again
    assert heard(theirs) == ("config", {"name": "spare3"})
    assert again.start({}) is not again
    theirs.close()
    assert newcomers.come_again(again) is None
    assert newcomers.come_again("a process of this host") is None


@pytest.mark.parametrize("how", ["ended", "cut off"])
def test_the_rank_of_an_agent_that_is_gone_is_free(peers: Peers, how: str) -> None:
    ours, theirs = peers.pair()
    member = RemoteWorker("worker0", hello(1), ours)
    assert member.home_lives
    if how == "ended":
        theirs.close()  # and nobody has read it yet
    else:
        member.fence()
    assert not member.home_lives
    assert Newcomers(0).come(hello(1), peers.pair()[0], [member]) is not None


def test_a_rank_takes_a_gpu_that_no_other_of_its_host_has(peers: Peers) -> None:
    member = RemoteWorker("spare0", hello(1, gpus=2), peers.pair()[0])
    assert [member.device(taken) for taken in ([], ["cuda:0"], ["cuda:1"], ["cuda:0", "cuda:1", "cuda:0"])] == [
        "cuda:0", "cuda:1", "cuda:0", "cuda:1",
    ]  # fmt: skip
    assert RemoteWorker("spare0", hello(1), peers.pair()[0]).device([]) == "cpu"
