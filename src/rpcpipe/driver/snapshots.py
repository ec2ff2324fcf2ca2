"""The snapshots of a pipeline's workers: each lies on two hosts, so it is there whichever of them is lost."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

from rpcpipe.cluster.rendezvous import Kept
from rpcpipe.cluster.tenancy import PipelineCluster, kept_apart
from rpcpipe.driver.driver import Driver
from rpcpipe.driver.replies import is_done, outcome_of
from rpcpipe.errors import Failure, WorkerLost
from rpcpipe.planning.loss_cost import keepers
from rpcpipe.worker.messages import KeptAt
from rpcpipe.worker.worker_operations import TakeSnapshot


class _Copy(NamedTuple):
    """Where a copy of a worker's snapshot lies: what it is lost with, and how it is kept."""

    host: str
    kept: Kept


@dataclass(frozen=True)
class _Pending:
    """A snapshot that workers are taking and sending. ``hosts``, ``keepers``: by worker, as they were then."""

    number: int
    begun: float
    hosts: Mapping[str, str]
    keepers: Mapping[str, str]
    taken: Mapping[str, Future[Any]]
    stored: Mapping[str, Future[Any]]
    ends: list[float]

    @property
    def replies(self) -> list[Future[Any]]:
        return [*self.taken.values(), *self.stored.values()]

    @property
    def failure(self) -> Failure | None:
        """The first failure of a worker, other than by its loss."""
        outcomes = (outcome_of(reply).result() for reply in self.replies)
        return next((outcome for outcome in outcomes if isinstance(outcome, Failure)), None)


class Snapshots:
    """Takes snapshots and knows where the newest lies that all workers have.

    ``seconds``: how long it took, from the first message until the last worker had it. ``refusal``: why none can be
    taken.
    """

    def __init__(self, cluster: PipelineCluster, driver: Driver) -> None:
        self.refusal: Failure | None = None
        self.seconds = 0.0
        self._cluster, self._driver = cluster, driver
        self._numbers = 0
        self._under_way: _Pending | None = None
        self._newest: dict[str, list[_Copy]] = {}
        self._newest_number = -1

    @property
    def pending(self) -> bool:
        """Whether one is under way."""
        return self._under_way is not None

    @property
    def possible(self) -> bool:
        """Whether every worker has another one that does not die with it."""
        return len(set(self._hosts().values())) > 1

    def _hosts(self) -> dict[str, str]:
        hosts = self._cluster.hosts()
        return {name: hosts[name] for name in self._driver.workers}

    def take(self) -> None:
        """Have all workers take a snapshot, between two steps, and send it to each other; does not wait."""
        # Not in the place of the newest, which even and odd numbers take in turn: one in between may be given up.
        number = self._numbers + (self._numbers % 2 == self._newest_number % 2)
        hosts = self._hosts()
        names = list(hosts)
        apart = keepers(kept_apart(self._cluster, names))
        keeper_of = {name: names[keeper] for name, keeper in zip(names, apart, strict=True)}
        self._numbers = number + 1
        begun, ends = time.monotonic(), list[float]()
        taken = {name: self._driver.call(name, TakeSnapshot(number, keeper_of[name])) for name in names}
        stored = {name: self._driver.ask(keeper_of[name], "stored", name, number) for name in names}
        self._under_way = _Pending(number, begun, hosts, keeper_of, taken, stored, ends)
        for reply in self._under_way.replies:
            reply.add_done_callback(lambda _: ends.append(time.monotonic()))

    def settle(self) -> bool:
        """Let the snapshot under way be the newest if all workers have it; return whether it is."""
        now = self._under_way
        if now is None or not all(reply.done() for reply in now.replies):
            return False
        self.give_up()
        if not all(map(is_done, now.replies)):
            self.refusal = now.failure
            return False
        if self._hosts() != now.hosts:
            return False  # a host has gone since, and copies with it
        copies: dict[str, list[_Copy]] = {name: [] for name in now.hosts}
        try:
            for name, keeper in now.keepers.items():
                for holder, replies in ((name, now.taken), (keeper, now.stored)):
                    copies[name].append(self._copy(holder, now.hosts[holder], replies[name].result()))
        except (OSError, WorkerLost):
            _let_go(copies)
            return False  # somebody has died since
        _let_go(self._newest)
        self._newest, self._newest_number = copies, now.number
        self.seconds = max(now.ends) - now.begun
        for name in now.hosts:
            self._driver.ask(name, "forget_snapshots", now.number - 1)
        return True

    def _copy(self, holder: str, host: str, at: KeptAt) -> _Copy:
        """Keep the memory of ``holder`` open, whoever dies but its host."""
        return _Copy(host, self._cluster.keep(holder, *at))

    @property
    def safe(self) -> bool:
        """Whether the newest snapshot is whole whichever host is lost."""
        alive = [{copy.host for copy in copies if copy.kept.alive} for copies in self._newest.values()]
        return bool(alive) and all(len(hosts) > 1 for hosts in alive)

    def give_up(self) -> None:
        """Forget the snapshot under way."""
        self._under_way = None

    def bring(self) -> dict[str, str]:
        """Return by worker the path of its newest snapshot, there where it lives; have it sent there if need be.

        Raises WorkerLost if all copies of one are lost.
        """
        hosts, number = self._hosts(), self._newest_number
        waiting = dict[tuple[str, str], Future[Any]]()
        paths = dict[str, str]()
        for name, host in hosts.items():
            copies = [copy for copy in self._newest[name] if copy.kept.alive]
            near = next((copy for copy in copies if copy.host == host), None)
            if near is not None:
                paths[name] = near.kept.path
                continue
            senders = ((other, copy) for copy in copies for other, place in hosts.items() if place == copy.host)
            sender, far = next(senders, (None, None))
            if sender is None or far is None:
                raise WorkerLost(f"both hosts that had the snapshot of {name} are gone", worker=name)
            waiting[name, "sent"] = self._driver.ask(sender, "send_snapshot", name, number, far.kept.path, name)
            waiting[name, "stored"] = self._driver.ask(name, "stored", name, number)
        for (name, kind), at in self._driver.collect(waiting).items():
            if kind == "stored":
                copy = self._copy(name, hosts[name], at)
                self._newest[name].append(copy)
                paths[name] = copy.kept.path
        return paths

    def close(self) -> None:
        """Let go of all snapshots."""
        self.give_up()
        _let_go(self._newest)
        self._newest = {}


def _let_go(copies: Mapping[str, list[_Copy]]) -> None:
    for own in copies.values():
        for copy in own:
            copy.kept.close()
