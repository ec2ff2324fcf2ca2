"""Replace lost workers of a live group: the other processes, their agents and their state stay as they are.

A round starts processes (or takes spares) for some names, lets every other process of the group admit them, and ends
when each of them and each other process have called each other. Whoever is lost meanwhile is nobody's to wait for: it
stays, or becomes, lost, and the next round's.
"""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from rpcpipe.cluster.liveness import Liveness
from rpcpipe.cluster.rendezvous import Member, StoppedMembers, WorkerGroup, describe
from rpcpipe.errors import WorkerLost
from rpcpipe.transport.base import DRIVER
from rpcpipe.transport.roster import Seat, seats
from rpcpipe.transport.rpc import this_process

_BURY_SECONDS = 5.0
_TICK = 0.25
REPORTS = ("set", "joined", "met", "died", "silent")

# Notes that a process is lost, and how.
Lose = Callable[[Member, str], None]


class Supervisor:
    """Replaces processes on the main thread, by what the monitor's thread hands to ``handle``."""

    def __init__(self, group: WorkerGroup, liveness: Liveness, lose: Lose) -> None:
        self._group = group
        self._liveness = liveness
        self._lose = lose
        self._reports: queue.SimpleQueue[tuple[str, str, Any]] = queue.SimpleQueue()

    def handle(self, source: Member, kind: str, payload: Any) -> None:
        """Take a report of one of ``REPORTS``; a death or silence has been noted before."""
        self._reports.put((source.name, kind, payload))

    def bury(self, names: Sequence[str]) -> None:
        """End the processes of ``names``, which are lost, and release what belongs to them.

        Raises WorkerLost for one that does not end although it is killed.
        """
        members = [self._group.members[name] for name in names]
        for member in members:
            if self._liveness.is_alive(member):
                member.kill()
        if not self._liveness.wait_for_ends(members, _BURY_SECONDS):
            left = next(member for member in members if self._liveness.is_alive(member))
            raise WorkerLost(
                f"{describe(left)} was killed, but has not ended for {_BURY_SECONDS:g} s ({left.state()})",
                worker=left.name, host=left.host, pid=left.pid,
            )  # fmt: skip
        for member in members:
            member.close()

    def replace(self, devices: Mapping[str, str], spares: Mapping[str, Member]) -> list[str]:
        """Let the processes ``spares``, by their new names, or new ones on ``devices`` take the names of lost ones.

        Returns the names that are not lost any more.
        """
        self._drain()
        group, known = self._group, self._group.roster.seats
        found = {name: known[member.name] for name, member in spares.items()}
        for name, member in spares.items():
            del group.members[member.name]
            member.name = name
            group.members[name] = member
        present = {name: known[name] for name, member in group.members.items() if self._lives(member)}
        round_ = _Round(group, self._liveness, self._reports, self._lose, {**present, **found, DRIVER: known[DRIVER]})
        try:
            for name in spares:
                round_.successors[name] = group.members[name]
            for name, device in devices.items():
                self._start(round_, name, device)
            round_.run()
            return [name for name, member in round_.successors.items() if self._liveness.restore(member)]
        except BaseException:
            for member in round_.successors.values():
                if self._liveness.is_alive(member):
                    member.kill()
            raise

    def _lives(self, member: Member) -> bool:
        return self._liveness.is_alive(member) and not self._liveness.is_lost(member)

    def _start(self, round_: _Round, name: str, device: str) -> None:
        """Start a process for ``name``, which is to join those that are present."""
        group = self._group
        assert group.start is not None
        seat = seats.give(name)
        member = group.start(group.worker_config(name, device, {**round_.present, name: seat}))
        self._liveness.start(member)
        group.members[name] = round_.successors[name] = member
        round_.starting[name] = seat
        group.monitor.add(member)
        group.logs.begin(name)
        for other in round_.present.values():
            for key, value in group.published(other):
                member.send("key", [key, value])
        member.send("join")

    def dismiss(self, names: Sequence[str]) -> None:
        """Let the group forget ``names``, whose processes have been buried."""
        if not names:
            return
        for name in names:
            self._group.members.pop(name)
            self._liveness.forget(name)
        self._group.forget(self._group.transport.admit({}, names))
        for member in self._group.members.values():
            member.send("admit", [{}, list(names)])

    def _drain(self) -> None:
        """Drop reports of earlier rounds: their processes have ended, or did not need to report them."""
        while not self._reports.empty():
            self._reports.get()


class _Round:
    """One round: ``successors`` join those ``present``, who can be called already (the driver and spares, too).

    ``starting``: the seats of those successors that are new processes.
    """

    def __init__(
        self,
        group: WorkerGroup,
        liveness: Liveness,
        reports: queue.SimpleQueue[tuple[str, str, Any]],
        lose: Lose,
        present: Mapping[str, Seat],
    ) -> None:
        self.present = present
        self.successors: dict[str, Member] = {}
        self.starting: dict[str, Seat] = {}
        self._group, self._liveness, self._lose, self._reports = group, liveness, lose, reports
        self._deadline = time.monotonic() + group.timeout
        self._stopped = StoppedMembers()
        self._joined: set[str] = set()
        self._unmet: set[tuple[str, str]] = set()  # (who calls, who has not answered yet)

    def run(self) -> None:
        """Return once every successor is a full member of the group, or lost."""
        while missing := [name for name in self.starting if self._lives(name) and name not in self._joined]:
            self._pump(missing)
        self._introduce([name for name in self.successors if self._lives(name)])
        while waiting := self._waiting():
            self._pump(waiting)

    def _introduce(self, names: Sequence[str]) -> None:
        """Let everybody know ``names``, and have each of them and everybody call each other."""
        group = self._group
        seats = {name: self.starting.get(name) or self.present[name] for name in names}
        group.forget(group.transport.admit(seats))
        addresses = [item for name in names if name in self.starting for item in group.published(seats[name])]
        everybody = [name for name in {**self.present, **seats} if name == DRIVER or self._lives(name)]
        agent = this_process.agent
        assert agent is not None
        callable_ = [name for name in everybody if name != DRIVER or agent.listening]
        for name in everybody:
            others = [other for other in (callable_ if name in seats else names) if other != name]
            self._unmet |= {(name, other) for other in others}
            if name == DRIVER:
                self._call(others)
                continue
            member = group.members[name]
            for key, value in addresses:
                member.send("key", [key, value])
            member.send("admit", [seats, []])
            member.send("meet", others)

    def _call(self, others: Sequence[str]) -> None:
        for name in others:
            # One who was lost before it was admitted is not lost to the transport any more.
            if (error := self._liveness.lost.get(name)) is not None and not self._lives(name):
                self._group.transport.lose(name, error)
            wire = self._group.roster.seats[name].wire
            reply = self._group.transport.call(name, "clock")
            reply.add_done_callback(partial(self._called, wire))

    def _called(self, wire: str, reply: Future[Any]) -> None:
        error = reply.exception()
        self._reports.put((DRIVER, "met", [wire, None if error is None else str(error)]))

    def _lives(self, name: str) -> bool:
        member = self._group.members[name]
        return self._liveness.is_alive(member) and not self._liveness.is_lost(member)

    def _waiting(self) -> list[str]:
        """Return the successors that somebody who lives has not met yet."""
        self._unmet = {pair for pair in self._unmet if all(name == DRIVER or self._lives(name) for name in pair)}
        return sorted({name for pair in self._unmet for name in pair if name in self.successors})

    def _pump(self, missing: Sequence[str]) -> None:
        """Handle the next report; give up those of the successors ``missing`` who are stopped, or too late."""
        left = self._deadline - time.monotonic()
        with contextlib.suppress(queue.Empty):
            self._handle(*self._reports.get(timeout=max(0.0, min(left, _TICK))))
        for name in missing:
            member = self._group.members[name]
            if left <= 0:
                self._fail(name, f"did not join within {self._group.timeout:g} s")
            elif self._stopped.check(member):
                self._fail(name, f"does not join: {member.state()}")

    def _handle(self, source: str, kind: str, payload: Any) -> None:
        if kind == "set":
            self._group.values[payload[0]] = payload[1]
        elif kind == "joined":
            self._joined.add(source)
        elif kind == "met":
            wire, error = payload
            names = [name for name, seat in self._group.roster.seats.items() if seat.wire == wire]
            for name in names:
                self._met(source, name, error)

    def _met(self, caller: str, called: str, error: str | None) -> None:
        if error is None:
            self._unmet.discard((caller, called))
        elif (caller, called) in self._unmet and all(name == DRIVER or self._lives(name) for name in (caller, called)):
            # torch's listener closes for good when a process dies while it connects to it.
            how = f"takes no connections any more, since a process died while it connected ({error})"
            self._fail(called if called != DRIVER else caller, how)

    def _fail(self, name: str, how: str) -> None:
        member = self._group.members[name]
        self._lose(member, how)
        member.kill()
