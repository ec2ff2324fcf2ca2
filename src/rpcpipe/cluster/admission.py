"""Let processes join a live group: everybody admits them, then each of them and everybody call each other.

Whoever is lost meanwhile is nobody's to wait for: it stays, or becomes, lost.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from rpcpipe.cluster.liveness import Liveness
from rpcpipe.cluster.rendezvous import Member, StoppedMembers, WorkerGroup
from rpcpipe.transport.base import DRIVER
from rpcpipe.transport.roster import Seat

_TICK = 0.25
# What a round hears of.
REPORTS = ("set", "joined", "met", "died", "silent")

Report = tuple[str, str, Any]  # (worker's name, kind, payload)
# Notes that a process is lost, how, and the kind of event that this is.
Lose = Callable[[Member, str, str], None]

log = logging.getLogger("rpcpipe")


class Admission:
    """``successors`` join those ``present``, who can be called already (the driver and spares, too).

    ``starting``: the seats of those successors that are new processes. ``timeout``: seconds in which all must have
    joined. Runs on the main thread.
    """

    def __init__(
        self,
        group: WorkerGroup,
        liveness: Liveness,
        reports: queue.SimpleQueue[Report],
        lose: Lose,
        present: Mapping[str, Seat],
        timeout: float,
    ) -> None:
        self.present = present
        self.successors: dict[str, Member] = {}
        self.starting: dict[str, Seat] = {}
        self._group, self._liveness, self._lose, self._reports = group, liveness, lose, reports
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._stopped = StoppedMembers()
        self._joined: set[str] = set()
        self._unmet: set[tuple[str, str]] = set()  # (who calls, who has not answered yet)

    def run(self) -> None:
        """Return once every successor is a full member of the group, or lost."""
        if not self.starting:  # spares are connected to everybody
            self._admit()
            return
        # Long before anybody connects, which is when the new processes have started.
        self._group.set_gates([name for name in self.present if name != DRIVER], open_=True)
        try:
            self._admit()
        finally:
            self._group.set_gates(filter(self._lives, self._group.members), open_=False)

    def _admit(self) -> None:
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
        callable_ = [name for name in everybody if name != DRIVER or group.transport.gate.listening]
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
        return self._liveness.serves(self._group.members[name])

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
                self._fail(name, f"did not join within {self._timeout:g} s")
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
        self._lose(member, how, "silent")
        member.kill()
