"""Replace lost workers of a live group, and add and remove some: the others' processes and state stay as they are."""

from __future__ import annotations

import logging
import queue
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rpcpipe.cluster.admission import Admission, Lose, Report
from rpcpipe.cluster.liveness import ClusterEvent, Liveness
from rpcpipe.cluster.rendezvous import Member, Worker, WorkerGroup, describe, worker_name
from rpcpipe.errors import StateError, WorkerLost
from rpcpipe.transport.base import DRIVER
from rpcpipe.transport.roster import seats

_BURY_SECONDS = 5.0
_TRIES = 3  # processes that may fail to take one worker's place, one after the other

log = logging.getLogger("rpcpipe")


class Supervisor:
    """Has the workers and spares of a live group, and puts processes in their places; all on the main thread.

    The monitor's thread notes deaths in ``liveness`` and hands what else it hears to ``handle``.
    """

    def __init__(
        self, group: WorkerGroup, liveness: Liveness, workers: Sequence[Worker], spares: Sequence[Worker], lose: Lose
    ) -> None:
        self.workers, self.spares = tuple(workers), tuple(spares)
        self.events: list[ClusterEvent] = []
        self._group = group
        self._liveness = liveness
        self._lose = lose
        self._reports: queue.SimpleQueue[Report] = queue.SimpleQueue()

    def handle(self, source: Member, kind: str, payload: Any) -> None:
        """Take a report; a death or silence has been noted before."""
        self._reports.put((source.name, kind, payload))

    @property
    def lost(self) -> dict[str, WorkerLost]:
        """Return how the workers that are lost were; spares do not count."""
        lost = self._liveness.lost
        return {worker.name: lost[worker.name] for worker in self.workers if worker.name in lost}

    def replace(self) -> tuple[Worker, ...]:
        """Replace all workers that are lost, also those that are lost meanwhile; return their successors."""
        replaced: set[str] = set()
        tries: Counter[str] = Counter()
        causes: list[str] = []
        while lost := self.lost:
            causes += [str(error) for error in lost.values()]
            if self._group.starter is None or any(tries[name] >= _TRIES for name in lost):
                raise _not_replaced(lost, causes)
            tries.update(lost.keys())
            replaced |= self._replace_once(lost)
        return tuple(worker for worker in self.workers if worker.name in replaced)

    def _replace_once(self, lost: Mapping[str, WorkerLost]) -> set[str]:
        """Do a round of replacement for the names ``lost``; return those that are not lost any more."""
        begun = time.monotonic()
        self._bury(lost)
        self._drop_lost_spares()
        places = {worker.name: worker for worker in self.workers if worker.name in lost}
        taken = self._take_spares(places.values())
        devices = {name: taken[name].device if name in taken else place.device for name, place in places.items()}
        joined = self._join({name: devices[name] for name in places if name not in taken}, taken)
        for name in joined:
            member = self._group.members[name]
            worker = replace(places[name], host=member.host, pid=member.pid, device=devices[name])
            self.workers = tuple(worker if other.name == name else other for other in self.workers)
            self._tell(worker, lost[name], time.monotonic() - begun, name in taken)
        return set(joined)

    def _take_spares(self, places: Collection[Worker]) -> dict[str, Worker]:
        """Choose spares for ``places``, each of its kind of device; return them by the places' names."""
        taken: dict[str, Worker] = {}
        for place in places:
            kind = place.device.partition(":")[0]
            spare = next((spare for spare in self.spares if spare.device.partition(":")[0] == kind), None)
            if spare is not None:
                taken[place.name] = spare
                self.spares = tuple(other for other in self.spares if other is not spare)
        return taken

    def _drop_lost_spares(self) -> None:
        lost = [spare.name for spare in self.spares if spare.name in self._liveness.lost]
        self._bury(lost)
        self._dismiss(lost)
        self.spares = tuple(spare for spare in self.spares if spare.name not in lost)

    def _tell(self, worker: Worker, lost: WorkerLost, seconds: float, was_spare: bool) -> None:
        how = str(lost).splitlines()[0].removesuffix(".")
        kind, who = ("spare used", "a spare") if was_spare else ("replaced", "another process")
        self.events.append(ClusterEvent(kind, worker.name, worker.host, worker.pid, how, seconds))
        log.warning("%s; %s (%s:%d) took its place within %.2f s", how, who, worker.host, worker.pid, seconds)

    def add(self, count: int) -> tuple[Worker, ...]:
        """Add ``count`` workers; return them. Raises WorkerLost, and adds none, where one does not join.

        Raises StateError where this process cannot start workers.
        """
        if (starter := self._group.starter) is None or (device_of := starter.device_of) is None:
            raise StateError("this cluster's processes were started from outside; start more ranks and connect again")
        first = max(worker.rank for worker in self.workers) + 1
        places = {worker_name(rank): (rank, device_of(rank - 1)) for rank in range(first, first + count)}
        waiting, causes = dict(places), list[str]()
        for _ in range(_TRIES):
            joined = self._join({name: device for name, (_, device) in waiting.items()}, {})
            waiting = {name: place for name, place in waiting.items() if name not in joined}
            if not waiting:
                break
            causes += [str(self._liveness.lost[name]) for name in waiting]
            self._bury(waiting)
        members = self._group.members
        added = [Worker(name, rank, members[name].host, members[name].pid, dev) for name, (rank, dev) in places.items()]
        self.workers += tuple(added)
        if waiting:
            self.remove([worker.name for worker in added])
            raise WorkerLost(
                f"{', '.join(waiting)} could not be added: {'; '.join(causes)}", worker=next(iter(waiting))
            )
        for worker in added:
            self.events.append(ClusterEvent("added", worker.name, worker.host, worker.pid, "has joined"))
        return tuple(added)

    def remove(self, names: Collection[str]) -> None:
        """End the workers and spares ``names`` and let everybody forget them."""
        for name in names:
            member = self._group.members[name]
            if self._liveness.serves(member):
                self._lose(member, "was removed on request", "removed")
        self._bury(names)
        self._dismiss(names)
        self.workers = tuple(worker for worker in self.workers if worker.name not in names)
        self.spares = tuple(worker for worker in self.spares if worker.name not in names)

    # --- processes ---

    def _bury(self, names: Collection[str]) -> None:
        """End the processes of ``names``, which are lost.

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

    def _dismiss(self, names: Collection[str]) -> None:
        """Let the group forget ``names``, whose processes have been buried."""
        if not names:
            return
        for name in names:
            self._group.members.pop(name).close()
            self._liveness.forget(name)
        self._group.forget(self._group.transport.admit({}, names))
        for member in self._group.members.values():
            member.send("admit", [{}, list(names)])

    def _join(self, devices: Mapping[str, str], spares: Mapping[str, Worker]) -> list[str]:
        """Let the processes of ``spares``, by their new names, or new ones on ``devices`` take the names given.

        Nobody has these names, or whoever had them has been buried. Returns the names that are not lost now.
        """
        while not self._reports.empty():  # of earlier rounds, whose processes have ended or been admitted
            self._reports.get()
        group, known = self._group, self._group.roster.seats
        found = {name: known[spare.name] for name, spare in spares.items()}
        for name, spare in spares.items():
            group.members[name].close()
            group.members[name] = member = group.members.pop(spare.name)
            member.name = name
        serving = [name for name, member in group.members.items() if self._liveness.serves(member)]
        present = {name: known[name] for name in serving if name in known}
        everybody = {**present, **found, DRIVER: known[DRIVER]}
        admission = Admission(group, self._liveness, self._reports, self._lose, everybody)
        admission.successors.update({name: group.members[name] for name in spares})
        try:
            for name, device in devices.items():
                self._start(admission, name, device)
            admission.run()
            return [name for name, member in admission.successors.items() if self._liveness.restore(member)]
        except BaseException:
            for member in admission.successors.values():
                if self._liveness.is_alive(member):
                    member.kill()
            raise

    def _start(self, admission: Admission, name: str, device: str) -> None:
        """Start a process for ``name``, which is to join those that are present."""
        group = self._group
        assert group.starter is not None
        seat = seats.give(name)
        config = group.worker_config(name, device, {**admission.present, name: seat})
        member = group.starter.start(config, group.members.get(name))
        self._liveness.start(member)
        group.members[name] = admission.successors[name] = member
        admission.starting[name] = seat
        group.monitor.add(member)
        group.logs.begin(name)
        for other in admission.present.values():
            for key, value in group.published(other):
                member.send("key", [key, value])
        member.send("join")


def _not_replaced(lost: Mapping[str, WorkerLost], causes: Sequence[str]) -> WorkerLost:
    name, error = next(iter(lost.items()))
    story = f"{name} could not be replaced: " + "\n".join(dict.fromkeys(causes))
    return WorkerLost(story, worker=name, stages=error.stages, host=error.host, pid=error.pid)
