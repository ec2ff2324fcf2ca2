"""Who takes the place of a worker that is lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from rpcpipe.cluster.rendezvous import Worker
from rpcpipe.cluster.successors import Successor, choose_successors
from rpcpipe.errors import WorkerLost


class Member:
    """Where a process was started, and whether another one can be."""

    def __init__(self, domain: str, home_lives: bool) -> None:
        self.domain, self.home_lives = domain, home_lives


class Starter:
    """Lets processes stand in for those on ``kinds``."""

    def __init__(self, *kinds: str) -> None:
        self._kinds = kinds

    def stand_in(self, device: str) -> str | None:
        return "here" if device in self._kinds else None


def worker(name: str, device: str = "cpu") -> Worker:
    return Worker(name, 1, "host", 1, device)


def choose(places: list[Worker], spares: list[Worker], members: Mapping[str, Any], *kinds: str) -> Any:
    return choose_successors(places, spares, members, Starter(*kinds))  # type: ignore[arg-type]


LOST, LAST = worker("worker0"), worker("worker1")
NEAR, FAR = worker("spare0"), worker("spare1")


def test_a_spare_that_was_started_where_the_lost_one_was_goes_first() -> None:
    members = {"worker0": Member("a", True), "spare1": Member("b", True), "spare0": Member("a", True)}
    assert choose([LOST], [FAR, NEAR], members) == {"worker0": Successor("spare used", "cpu", NEAR)}


def test_no_other_spare_is_used_while_another_process_can_be_started_there() -> None:
    members = {"worker0": Member("a", True), "spare1": Member("b", True)}
    assert choose([LOST], [FAR], members, "cpu") == {"worker0": Successor("replaced", "cpu", None)}


def test_then_any_spare_of_the_same_kind_of_device() -> None:
    members = {"worker0": Member("a", False), "spare0": Member("b", True), "spare1": Member("c", True)}
    lost, spares = worker("worker0", "cuda:1"), [worker("spare0"), worker("spare1", "cuda:0")]
    assert choose([lost], spares, members) == {"worker0": Successor("spare used", "cuda:0", spares[1])}


def test_then_a_process_of_the_drivers_host() -> None:
    members = {"worker0": Member("a", False), "worker1": Member("b", False), "spare1": Member("c", True)}
    assert choose([LOST, LAST], [FAR], members, "cpu") == {
        "worker0": Successor("spare used", "cpu", FAR), "worker1": Successor("stands in", "here", None),
    }  # fmt: skip


def test_nobody_is_left() -> None:
    members = {"worker0": Member("a#1", False), "worker1": Member("b#2", False), "spare1": Member("c#3", True)}
    with pytest.raises(
        WorkerLost, match=r"^nobody can take the place of worker1 \(b#2\): .*no spare on cpu is left"
    ) as caught:
        choose([LOST, LAST], [FAR], members, "cuda:0")
    assert caught.value.worker == "worker1"
    for way in ("rp.connect(spares=…)", 'rp.connect(heal="shrink")', "Start the rank again"):
        assert way in str(caught.value)
