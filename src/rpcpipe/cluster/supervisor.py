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
from rpcpipe.cluster.successors import Successor, choose_successors
from rpcpipe.errors import StateError, WorkerLost
from rpcpipe.transport.base import DRIVER
from rpcpipe.transport.roster import seats

_BURY_SECONDS = 5.0
# An agent that lives says at once that it has killed its worker.
_ANSWER_SECONDS = 1.0
_WELCOME_SECONDS = 30.0
_TRIES = 3  # processes that may fail to take one worker's place, one after the other

_WHO = {"spare used": "a spare", "replaced": "another process", "stands in": "a process of the driver's host"}

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

    @property
    def stand_ins(self) -> tuple[Worker, ...]:
        """Return the workers that are processes of this host in the place of a rank's."""
        stands_in, members = self._group.starter.stands_in, self._group.members
        return tuple(worker for worker in self.workers if stands_in(members[worker.name]))

    def welcome(self) -> None:
        """Let the ranks that have come meanwhile join, as spares."""
        came = {member.name: member for member in self._group.newcomers.take()}
        if not came:
            return
        members, devices = self._group.members, dict[str, str]()
        known = {worker.name: worker for worker in self.workers + self.spares}
        for name, member in came.items():
            taken = [one.device for one in known.values() if one.host == member.host and members[one.name].home_lives]
            devices[name] = member.device(taken)
            members[name] = member
            known[name] = Worker(name, member.rank, member.host, member.pid, devices[name])
        # Whoever cannot be reached must not hold the others up for long.
        joined = self._join(devices, {}, min(self._group.timeout, _WELCOME_SECONDS))
        for name in joined:
            spare = replace(known[name], pid=members[name].pid)
            self.spares += (spare,)
            self.events.append(ClusterEvent("joined", name, spare.host, spare.pid, "has joined as a spare"))
            log.warning("rank %d (%s:%d) has joined as a spare, %s", spare.rank, spare.host, spare.pid, name)
        failed = came.keys() - joined
        self._bury(failed)
        self._dismiss(failed)

    def replace(self) -> tuple[Worker, ...]:
        """Replace all workers that are lost, also those that are lost meanwhile; return their successors."""
        replaced: set[str] = set()
        tries: Counter[str] = Counter()
        causes: list[str] = []
        while lost := self.lost:
            causes += [str(error) for error in lost.values()]
            if any(tries[name] >= _TRIES for name in lost):
                raise _not_replaced(lost, causes)
            tries.update(lost.keys())
            replaced |= self._replace_once(lost)
        return tuple(worker for worker in self.workers if worker.name in replaced)

    def _replace_once(self, lost: Mapping[str, WorkerLost]) -> set[str]:
        """Do a round of replacement for the names ``lost``; return those that are not lost any more."""
        begun = time.monotonic()
        self._bury(lost)
        self._drop_lost_spares()
        self.welcome()
        places = {worker.name: worker for worker in self.workers if worker.name in lost}
        try:
            chosen = choose_successors(places.values(), self.spares, self._group.members, self._group.starter)
        except WorkerLost as nobody:
            raise _not_replaced({nobody.worker: lost[nobody.worker]}, [str(nobody), *map(str, lost.values())]) from None
        taken = {name: one.spare for name, one in chosen.items() if one.spare is not None}
        self.spares = tuple(spare for spare in self.spares if spare not in taken.values())
        joined = self._join({name: one.device for name, one in chosen.items() if one.spare is None}, taken)
        for name in joined:
            member = self._group.members[name]
            worker = replace(places[name], host=member.host, pid=member.pid, device=chosen[name].device)
            self.workers = tuple(worker if other.name == name else other for other in self.workers)
            self._tell(worker, lost[name], time.monotonic() - begun, chosen[name])
        return set(joined)

    def _drop_lost_spares(self) -> None:
        """Forget the spares that are lost; a rank's agent that still lives comes again, for another worker."""
        lost = [spare.name for spare in self.spares if spare.name in self._liveness.lost]
        self._bury(lost)
        again = {name: self._group.newcomers.come_again(self._group.members[name]) for name in lost}
        self._dismiss(lost, staying=[name for name, member in again.items() if member is not None])
        for member in again.values():
            if member is not None:
                self._group.monitor.add(member)
        self.spares = tuple(spare for spare in self.spares if spare.name not in lost)

    def _tell(self, worker: Worker, lost: WorkerLost, seconds: float, by: Successor) -> None:
        how = str(lost).splitlines()[0].removesuffix(".")
        who = _WHO[by.event]
        self.events.append(ClusterEvent(by.event, worker.name, worker.host, worker.pid, how, seconds))
        log.warning("%s; %s (%s:%d) took its place within %.2f s", how, who, worker.host, worker.pid, seconds)

    def add(self, count: int) -> tuple[Worker, ...]:
        """Add ``count`` workers; return them. Raises WorkerLost, and adds none, where one does not join.

        Ranks cannot be started from here: spares become workers. Raises StateError where there are too few.
        """
        first = max(worker.rank for worker in self.workers) + 1
        ranks = {worker_name(rank): rank for rank in range(first, first + count)}
        started = {name: self._group.starter.device_of(rank - 1) for name, rank in ranks.items()}
        devices = {name: device for name, device in started.items() if device is not None}
        spares = {} if devices else self._take_spares(list(ranks))
        causes = self._add_processes(devices) if devices else self._lost_of(self._join({}, spares), spares)
        devices |= {name: spare.device for name, spare in spares.items()}
        members = self._group.members
        added = [Worker(name, ranks[name], members[name].host, members[name].pid, devices[name]) for name in ranks]
        self.workers += tuple(added)
        if causes:
            self.remove([worker.name for worker in added])
            first_lost = next(iter(causes))
            raise WorkerLost(f"{', '.join(causes)} could not be added: {'; '.join(causes.values())}", worker=first_lost)
        for worker in added:
            self.events.append(ClusterEvent("added", worker.name, worker.host, worker.pid, "has joined"))
        return tuple(added)

    def _add_processes(self, devices: Mapping[str, str]) -> dict[str, str]:
        """Start workers; return, by name, how those ended that did not join in any of the tries."""
        causes: dict[str, str] = {}
        waiting = dict(devices)
        for _ in range(_TRIES):
            lost = self._lost_of(self._join(waiting, {}), waiting)
            if not lost:
                return {}
            causes = {name: f"{causes[name]}; {how}" if name in causes else how for name, how in lost.items()}
            waiting = {name: devices[name] for name in lost}
            self._bury(waiting)
        return causes

    def _lost_of(self, joined: Collection[str], names: Collection[str]) -> dict[str, str]:
        """Return, by name, how those of ``names`` were lost that have not ``joined``."""
        lost = self._liveness.lost
        return {name: str(lost[name]) for name in names if name not in joined}

    def _take_spares(self, names: Sequence[str]) -> dict[str, Worker]:
        """Take a spare for each of ``names``, which are to be workers; return them by these."""
        self._drop_lost_spares()
        self.welcome()
        if (missing := len(names) - len(self.spares)) > 0:
            raise StateError(
                f"{len(names)} workers are to be added and {len(self.spares)} spares are there: start {missing} more"
                f" rank{'s' * (missing > 1)} (`python -m rpcpipe.worker` with MASTER_ADDR, MASTER_PORT and secret as"
                " the others have, and a RANK that nobody has, below WORLD_SIZE) and call again once it has come"
            )
        taken, self.spares = self.spares[: len(names)], self.spares[len(names) :]
        return dict(zip(names, taken, strict=True))

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
        """End the processes of ``names``, which are lost. Whoever cannot be told to, as its host is gone, is cut off.

        Raises WorkerLost for one that does not end although it is killed.
        """
        members = [self._group.members[name] for name in names]
        for member in members:
            if self._liveness.is_alive(member):
                member.kill()
        if not self._liveness.wait_for_ends(members, _ANSWER_SECONDS):
            for member in filter(self._liveness.is_alive, members):
                member.fence()
        if not self._liveness.wait_for_ends(members, _BURY_SECONDS):
            left = next(member for member in members if self._liveness.is_alive(member))
            raise WorkerLost(
                f"{describe(left)} was killed, but has not ended for {_BURY_SECONDS:g} s ({left.state()})",
                worker=left.name, host=left.host, pid=left.pid,
            )  # fmt: skip

    def _dismiss(self, names: Collection[str], staying: Collection[str] = ()) -> None:
        """Let the group forget ``names``, whose processes have been buried; the agents of those ``staying`` go on."""
        if not names:
            return
        for name in names:
            member = self._group.members.pop(name)
            if name not in staying:
                member.dismiss()
            self._liveness.forget(name)
        self._group.forget(self._group.transport.admit({}, names))
        for member in self._group.members.values():
            member.send("admit", [{}, list(names)])

    def _join(
        self, devices: Mapping[str, str], spares: Mapping[str, Worker], timeout: float | None = None
    ) -> list[str]:
        """Let the processes of ``spares``, by their new names, or new ones on ``devices`` take the names given.

        Nobody has these names, or whoever had them has been buried. Returns the names that are not lost now. Who has
        not joined within ``timeout`` seconds, the group's by default, is lost.
        """
        while not self._reports.empty():  # of earlier rounds, whose processes have ended or been admitted
            self._reports.get()
        group, known = self._group, self._group.roster.seats
        found = {name: known[spare.name] for name, spare in spares.items()}
        for name, spare in spares.items():
            if name in group.members:
                group.members[name].close()
            group.members[name] = member = group.members.pop(spare.name)
            member.name = name
        serving = [name for name, member in group.members.items() if self._liveness.serves(member)]
        present = {name: known[name] for name in serving if name in known}
        everybody = {**present, **found, DRIVER: known[DRIVER]}
        seconds = group.timeout if timeout is None else timeout
        admission = Admission(group, self._liveness, self._reports, self._lose, everybody, seconds)
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
        seat, predecessor = seats.give(name), group.members.get(name)
        config = group.worker_config(name, device, {**admission.present, name: seat})
        member = group.starter.start(config, predecessor)
        self._liveness.start(member)
        group.members[name] = admission.successors[name] = member
        admission.starting[name] = seat
        if member is not predecessor:  # a rank that has waited is watched already
            group.monitor.add(member)
        group.logs.begin(name)
        for other in admission.present.values():
            for key, value in group.published(other):
                member.send("key", [key, value])
        member.send("join")
        if not member.home_lives:  # it may have ended before the first line that counts it as alive
            self._lose(member, "ended before it joined", "died")
            self._liveness.end(member)


def _not_replaced(lost: Mapping[str, WorkerLost], causes: Sequence[str]) -> WorkerLost:
    name, error = next(iter(lost.items()))
    story = f"{name} could not be replaced: " + "\n".join(dict.fromkeys(causes))
    return WorkerLost(story, worker=name, stages=error.stages, host=error.host, pid=error.pid)
