"""Form a group: bring a driver and its workers together until all can call each other."""

from __future__ import annotations

import logging
import queue
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from rpcpipe.cluster.join_listener import JoinListener
from rpcpipe.cluster.monitor import Monitor
from rpcpipe.cluster.newcomers import Newcomers
from rpcpipe.cluster.process import Reader
from rpcpipe.cluster.remote_worker import RemoteWorker
from rpcpipe.cluster.worker_logs import WorkerLogs
from rpcpipe.errors import RendezvousError
from rpcpipe.transport.base import DRIVER
from rpcpipe.transport.roster import DRIVERS_SEAT, Roster, Seat, seats
from rpcpipe.transport.rpc import RpcTransport, this_process
from rpcpipe.transport.rpc_sockets import address_key, cut
from rpcpipe.transport.rpc_store import ExchangeStore

# A worker may be stopped for so long while it starts; a debugger that attaches stops it, too.
_STOPPED_SECONDS = 1.5


class Kept(Protocol):
    """What a worker has in memory, kept open on its host. ``path``: what a process there opens.

    ``alive``: whether it is still held; not once the rank's agent, which holds it, is gone.
    """

    @property
    def path(self) -> str: ...

    @property
    def alive(self) -> bool: ...

    def close(self) -> None: ...


class Member(Protocol):
    """A worker as its driver sees it: a WorkerProcess on this host, or a RemoteWorker.

    ``domain``: what it dies with, a rank's agent or this host. ``home_lives``: whether another worker can be started
    there. ``fence``: cut off one that does not end although it is killed, so that it counts as ended. ``dismiss``:
    ``close``, and end also the agent, with status 0.
    """

    name: str
    host: str
    domain: str

    @property
    def pid(self) -> int: ...

    def send(self, kind: str, payload: Any = None) -> None: ...

    def readers(self) -> Mapping[int, Reader]: ...

    def keep(self, pid: int, descriptor: int) -> Kept: ...

    def state(self) -> str: ...

    def stopped(self) -> bool: ...

    def kill(self) -> None: ...

    @property
    def home_lives(self) -> bool: ...

    def fence(self) -> None: ...

    def dismiss(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Worker:
    """A worker's name, rank (from 1) and place."""

    name: str
    rank: int
    host: str
    pid: int
    device: str


def describe(member: Member) -> str:
    """Return name, host and pid, for messages."""
    return f"{member.name} ({member.host}:{member.pid})"


def worker_name(rank: int) -> str:
    """Return the name of the worker of ``rank``, which counts from 1; rank 0 is the driver."""
    return f"worker{rank - 1}"


def worker_names(workers: int) -> list[str]:
    """Return the names of ``workers`` workers, by rank from 1."""
    return [worker_name(rank) for rank in range(1, workers + 1)]


class Starter(Protocol):
    """Starts workers of a live group."""

    def start(self, config: Mapping[str, Any], predecessor: Member | None) -> Member:
        """Start a worker by its ``worker_config``, in the place of one that has ended, if any.

        What belongs to that one is released, or used again. A rank that waits is its own predecessor.
        """
        ...

    def device_of(self, index: int) -> str | None:
        """Return the device of the index-th worker; None where further ones come by themselves, as ranks."""
        ...

    def stand_in(self, device: str) -> str | None:
        """Return the device of a process of this host in the place of one on ``device``; None if none may be there."""
        ...

    def stands_in(self, member: Member) -> bool:
        """Return whether ``member`` is such a process."""
        ...


@dataclass(eq=False)
class WorkerGroup:
    """The workers by name, alive or starting, and what hears them.

    ``timeout``: seconds for the group to form. ``values`` are what torch's agents have published, addresses.
    ``starter`` starts further workers; ranks that come later are among ``newcomers``. ``beats``: by worker, its last
    heartbeat while the group formed.
    """

    monitor: Monitor
    logs: WorkerLogs
    timeout: float
    names: Sequence[str]
    starter: Starter
    members: dict[str, Member] = field(default_factory=dict)
    listener: JoinListener | None = None
    values: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.newcomers = Newcomers(len(self.names))
        given = {DRIVER: DRIVERS_SEAT, **{name: seats.give(name) for name in self.names}}
        self.roster = Roster(uuid.uuid4().hex, DRIVER, given)
        self.transport = RpcTransport(self.roster)
        self.beats: dict[str, Any] = {}

    def worker_config(self, name: str, device: str, seats: Mapping[str, Seat] | None = None) -> dict[str, Any]:
        """Return what every worker is told, on whatever host it is. ``seats``: its own and of those that it joins."""
        return {
            "name": name,
            "seats": self.roster.seats if seats is None else seats,
            "device": device,
            "timeout": self.timeout,
            "generation": self.roster.generation,
            "log_level": logging.getLogger().getEffectiveLevel(),
        }

    def published(self, seat: Seat) -> list[tuple[str, str]]:
        """Return what the process of ``seat`` has published: keys and values."""
        return [(key, value) for key, value in self.values.items() if key.rpartition("/")[2] == seat.wire]

    def forget(self, gone: Iterable[Seat]) -> None:
        """Forget what processes that are dead have published."""
        for seat in gone:
            for key, _ in self.published(seat):
                del self.values[key]

    def cut(self, lost: Member) -> None:
        """Let nobody wait for what ``lost``, a rank's worker, would have answered. Any thread."""
        seat = self.roster.seats.get(lost.name)  # None if it was about to join
        published = self.values.get(address_key(seat.wire)) if seat is not None else None
        if isinstance(lost, RemoteWorker) and published is not None:
            cut(published)
            for member in list(self.members.values()):
                if member is not lost:
                    member.send("cut", published)

    def handle(self, source: Any, kind: str, payload: Any) -> bool:
        """Handle an event that means the same at any time; return False for any other."""
        if kind == "log":
            stream, line = payload
            self.logs.feed(source.name, stream, line, time.monotonic())
        elif kind == "hello":
            hello, channel = payload
            if (member := self.newcomers.come(hello, channel, list(self.members.values()))) is not None:
                self.monitor.add(member)
        else:
            return False
        return True

    def housekeeping(self) -> None:
        """Do what is due from time to time; called after every poll of the monitor."""
        self.logs.flush(time.monotonic())
        if self.listener is not None:
            self.listener.drop_late()

    def set_gates(self, names: Iterable[str], *, open_: bool) -> None:
        """Let processes connect to this one and to the members ``names``, or none any more."""
        gate = self.transport.gate
        gate.open() if open_ else gate.close()
        for name in names:
            self.members[name].send("gate", open_)

    def close(self) -> None:
        """Release everything; the members are dead, dying, or told to die."""
        if self.listener is not None:
            self.listener.close()
        self.newcomers.close()
        for member in self.members.values():
            self.monitor.remove(member)
            member.close()
        self.monitor.close()
        self.logs.close()

    def abandon(self, reason: str) -> None:
        """Kill the members and release everything: the group did not form, because of ``reason``."""
        for member in self.members.values():
            member.send("abort", reason)
            member.kill()
        self.close()


def form(group: WorkerGroup, interface: str) -> None:
    """Wait until all of ``group`` can call each other over the network interface named ``interface``.

    Raises RendezvousError, naming who did not come and its last lines. Whatever it raises,
    KeyboardInterrupt included, the group is abandoned then.
    """
    try:
        _Rendezvous(group).run(interface)
    except BaseException as error:
        group.abandon(f"{type(error).__name__}: {error}")
        group.transport.leave()
        raise


class StoppedMembers:
    """Finds workers that are stopped before their first heartbeat, whose end nothing else shows."""

    def __init__(self) -> None:
        self._since: dict[Member, float] = {}

    def check(self, member: Member) -> bool:
        """Return whether ``member`` has been stopped for longer than it may be."""
        now = time.monotonic()
        if not member.stopped():
            self._since.pop(member, None)
            return False
        return now - self._since.setdefault(member, now) > _STOPPED_SECONDS


class _DriverEndpoint:
    """What the driver serves: workers only call it to open their connections."""

    def clock(self) -> int:
        return time.monotonic_ns()


class _Rendezvous:
    """The main thread's work while a group forms: hear everybody, pass on addresses, notice deaths."""

    def __init__(self, group: WorkerGroup) -> None:
        self._group = group
        self._members: list[Member] = list(group.members.values())
        self._deadline = time.monotonic() + group.timeout
        self._reported: dict[str, set[str]] = {"ready": set(), "joined": set()}
        # Who has been called by whom, and what came of it; the driver's calls end on other threads.
        self._met: queue.SimpleQueue[tuple[str, str, str | None]] = queue.SimpleQueue()
        self._stopped = StoppedMembers()

    def run(self, interface: str) -> None:
        group = self._group
        self._await_all("ready")
        for member in self._members:
            member.send("join")
        # Before a worker can call: its first call opens the connection and must be answered.
        group.transport.serve(DRIVER, _DriverEndpoint())
        store = ExchangeStore(self._publish, self._fetch)
        this_process.join(store, group.roster, interface=interface)
        self._await_all("joined")
        self._introduce_all()
        group.set_gates(group.members, open_=False)

    def _introduce_all(self) -> None:
        """Have all call each other, so that nobody needs to connect to anybody later."""
        group, everybody = self._group, [DRIVER, *self._group.members]
        for member in self._members:
            member.send("meet", [name for name in everybody if name != member.name])
        for name in group.members:
            group.transport.call(name, "clock").add_done_callback(partial(self._called, group.roster.seats[name].wire))
        wires = {group.roster.seats[name].wire for name in everybody}
        unmet = {(name, wire) for name in everybody for wire in wires if wire != group.roster.seats[name].wire}
        while unmet:
            callers = {name for name, _ in unmet}
            self._pump("call all others", [member for member in self._members if member.name in callers])
            while not self._met.empty():
                caller, wire, error = self._met.get()
                if error is not None:
                    raise RendezvousError(f"{caller} cannot call {wire}: {error}")
                unmet.discard((caller, wire))

    def _called(self, wire: str, reply: Future[Any]) -> None:
        """Runs on a thread of the transport."""
        error = reply.exception()
        self._met.put((DRIVER, wire, None if error is None else str(error)))
        self._group.monitor.wake()

    def _publish(self, key: str, value: str) -> None:
        self._group.values[key] = value
        for member in self._members:
            member.send("key", [key, value])

    def _fetch(self, key: str) -> str:
        while key not in self._group.values:
            self._pump(f"publish {key!r}", self._members)
        return self._group.values[key]

    def _await_all(self, report: str) -> None:
        while missing := [member for member in self._members if member.name not in self._reported[report]]:
            self._pump(f"report {report!r}", missing)

    def _pump(self, what: str, missing: Sequence[Member]) -> None:
        """Handle what happens next; raise RendezvousError once it is too late for ``missing`` to do ``what``."""
        now = time.monotonic()
        if now > self._deadline:
            raise RendezvousError(
                f"{', '.join(map(describe, missing))} did not {what} within {self._group.timeout:g} s: the host may be"
                " overloaded, or the network between the hosts closed; pass a larger timeout, or see `rpcpipe doctor`"
            )
        for source, kind, payload in self._group.monitor.poll(self._deadline - now):
            if not self._group.handle(source, kind, payload):
                self._handle(source, kind, payload)
        for member in missing:
            if self._stopped.check(member):
                raise RendezvousError(f"{describe(member)} does not start: {member.state()}")
        self._group.housekeeping()

    def _handle(self, source: Any, kind: str, payload: Any) -> None:
        if kind == "set":
            self._publish(*payload)
        elif kind == "met":
            self._met.put((source.name, *payload))
        elif kind == "beat":
            self._group.beats[source.name] = payload
        elif kind in self._reported:
            self._reported[kind].add(source.name)
        elif kind in ("died", "silent"):
            how = payload if kind == "died" else f"fell silent ({source.state()})"
            last = self._group.logs.tail(source.name)
            said = f". Its last lines:\n{last}" if last else " without a word"
            raise RendezvousError(f"{describe(source)} {how} while starting{said}")
