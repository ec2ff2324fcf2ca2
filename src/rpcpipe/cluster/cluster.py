"""Watch over a live group of workers: hear them, name those that are lost, end all."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, TypeVarTuple

from rpcpipe import _tables
from rpcpipe._arguments import require_callable, require_count
from rpcpipe.cluster.admission import REPORTS
from rpcpipe.cluster.liveness import ClusterEvent, Liveness, WorkerStatus
from rpcpipe.cluster.rendezvous import Kept, Member, Worker, WorkerGroup, describe
from rpcpipe.cluster.supervisor import Supervisor
from rpcpipe.cluster.tenancy import Tenant
from rpcpipe.errors import ArgumentError, DeadlineExceeded, Failure, StageError, StateError, WorkerLost, shown
from rpcpipe.transport.owner import Owner
from rpcpipe.transport.user_pickling import loads, named_dumps

log = logging.getLogger("rpcpipe")

R = TypeVar("R")
Arguments = TypeVarTuple("Arguments")

_STOP_SECONDS = 1.0
_KILL_SECONDS = 0.5
_DRAIN_SECONDS = 0.3
# So often workers may die while the dead are being replaced.
_HEALINGS = 5


class Cluster:
    """Live workers, made by ``rp.launch`` or ``rp.connect``. A context manager that closes them.

    ``workers`` hold the stages of pipelines; ``spares`` are idle. ``timeout``: seconds without any progress
    after which a wait raises DeadlineExceeded. ``heal``: how often a step that has lost workers may be tried again.
    ``events``: the deaths and replacements so far.
    """

    def __init__(
        self, group: WorkerGroup, workers: Sequence[Worker], spares: Sequence[Worker] = (), *, heal: int = 0
    ) -> None:
        self.timeout, self.heal = group.timeout, heal
        self.transport = group.transport
        self.pipelines: weakref.WeakSet[Tenant] = weakref.WeakSet()
        self._group = group
        # By worker: tasks done, what it does, memory, and when it said so. The monitor's thread replaces entries whole.
        self._beats: dict[str, tuple[int, str, int, float]] = {}
        self._liveness = Liveness(group.members.values())
        self._supervisor = Supervisor(group, self._liveness, workers, spares, self._lost)
        self._stages: dict[str, tuple[int, ...]] = {}
        self._replicas: dict[str, tuple[int, ...]] = {}
        self._closed = self._ending = False
        self._owner = Owner()
        for name, payload in group.beats.items():
            self._handle(group.members[name], "beat", payload)
        group.logs.label = self._label
        self._thread = threading.Thread(target=self._listen, daemon=True, name="rpcpipe-monitor")
        self._thread.start()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def workers(self) -> tuple[Worker, ...]:
        """Return the workers by rank, whose processes may be others after a replacement."""
        return self._supervisor.workers

    @property
    def spares(self) -> tuple[Worker, ...]:
        """Return the workers that no pipeline uses: a lost worker's place is taken by one."""
        return self._supervisor.spares

    @property
    def stand_ins(self) -> tuple[Worker, ...]:
        """Return the workers that are processes of this host since a rank's host died, with ``heal="shrink"``."""
        return self._supervisor.stand_ins

    @property
    def events(self) -> list[ClusterEvent]:
        """Return the deaths and replacements so far."""
        return self._supervisor.events

    @property
    def open(self) -> bool:
        """Return whether the cluster is not closed, and this process's own."""
        return not self._closed and not self._inherited

    @property
    def healthy(self) -> bool:
        """Return whether the cluster is open and no worker has died; a spare may have."""
        return self.open and not self._supervisor.lost

    @property
    def _inherited(self) -> bool:
        """Return whether this process is a fork of the one whose cluster it is."""
        return not self._owner.here

    def check(self) -> None:
        """Let ranks join that have come, and replace workers that have died.

        Raises StateError if the cluster is closed, WorkerLost if a worker stays lost.
        """
        self._check_open()
        self._supervisor.welcome()
        if self.heal:
            if self._supervisor.lost:
                self._restore()
            return  # whoever has died since is noticed by the call that follows
        for lost in self._supervisor.lost.values():
            raise lost.again()

    def _restore(self) -> None:
        """Replace all workers that are lost, and let all pipelines go on with their successors."""
        for left in reversed(range(_HEALINGS)):
            if not self._supervisor.lost:
                return
            try:
                self._supervisor.replace()
                for pipeline in list(self.pipelines):
                    pipeline.revive()
            except WorkerLost:
                if not left or not self._supervisor.lost:
                    raise

    def keep(self, worker: str, pid: int, descriptor: int) -> Kept:
        """Keep what a worker has in memory open on its host, so that its successor there can go on with it.

        Raises OSError if the process ``pid`` is not the worker any more.
        """
        return self._group.members[worker].keep(pid, descriptor)

    @property
    def spread(self) -> bool:
        """Return whether the death of a host of workers can be healed at all: the workers are ranks, and ``heal``."""
        return self.heal > 0 and self._group.listener is not None and len(self.workers) + len(self.spares) > 1

    def hosts(self) -> dict[str, str]:
        """Return by worker what it dies with: the agent of its rank (``host#rank``), or the driver's host."""
        return {worker.name: self._group.members[worker.name].domain for worker in self.workers}

    def _check_open(self) -> None:
        if self._closed:
            raise StateError("the cluster is closed; call rp.launch again")
        self._owner.check()

    def call(self, worker: str | int | Worker, function: Callable[[*Arguments], R], *args: *Arguments) -> R:
        """Return ``function(*args)``, run on a worker or spare (its name, rank from 1, or ``Worker``).

        Raises StageError for what the function raises, DeadlineExceeded after ``timeout`` seconds, and WorkerLost.
        """
        require_callable("function", function)
        self.check()
        name = self._name(worker)
        return self._call([name], function, args)[name]

    def call_all(self, function: Callable[[*Arguments], R], *args: *Arguments) -> dict[str, R]:
        """Return ``function(*args)`` by worker, run on all workers at once; spares are left out.

        Raises what ``call`` raises: the error of the first worker in order that has one, after all have answered.
        """
        require_callable("function", function)
        self.check()
        return self._call([worker.name for worker in self.workers], function, args)

    def _call(self, workers: Sequence[str], function: Callable[..., R], args: tuple[Any, ...]) -> dict[str, R]:
        data = named_dumps((function, args), "the call's function")
        replies = {worker: self.transport.call(worker, "run", data) for worker in workers}
        until = time.monotonic() + self.timeout
        waiting = set(replies.values())
        while waiting:
            done, waiting = self.transport.wait(waiting, max(0.0, until - time.monotonic()))
            if not done:
                late = ", ".join(worker for worker, reply in replies.items() if reply in waiting)
                raise DeadlineExceeded(f"{late} did not answer within {self.timeout:g} s")
        outcomes = {worker: reply.result() for worker, reply in replies.items()}
        for outcome in outcomes.values():
            if isinstance(outcome, Failure):
                raise StageError.of(outcome)
        return {worker: loads(outcome) for worker, outcome in outcomes.items()}

    def _name(self, worker: str | int | Worker) -> str:
        everybody = self.workers + self.spares
        for known in everybody:
            if not isinstance(worker, bool) and worker in (known, known.name, known.rank):
                return known.name
        known_as = ", ".join(f"{known.name} (rank {known.rank})" for known in everybody)
        raise ArgumentError(f"no worker {shown(worker)}; there are {known_as}; rank 0 is this process")

    def replace(self, *workers: str | int | Worker) -> tuple[Worker, ...]:
        """Put new processes in the place of ``workers`` and of all that are lost; return them as they are now, by rank.

        They have the names of the old ones and none of their state: no pipeline's actors, no tasks, no values. The
        other workers stay as they are. To be called on the main thread. Raises WorkerLost where it cannot be done, with
        all that went wrong.
        """
        self._check_open()
        for name in [self._name(worker) for worker in workers]:
            self._lost(self._group.members[name], "was replaced on request", "removed")
        return self._supervisor.replace()

    def add_workers(self, count: int = 1) -> tuple[Worker, ...]:
        """Add ``count`` workers and return them: processes of this host, or of a cluster of ranks spares.

        Pipelines that exist do not use them. Raises StateError where there are not so many spares, WorkerLost where
        they do not join.
        """
        self.check()
        return self._supervisor.add(require_count("count", count, most=1024))

    def remove_workers(self, *workers: str | int | Worker) -> None:
        """End ``workers``, which may be spares, and with a rank's worker its agent.

        Raises StateError for one that holds stages, or is the last.
        """
        self._check_open()
        names = [self._name(worker) for worker in workers]
        for name in names:
            if stages := self.stages_on(name):
                raise StateError(f"{name} holds stages {', '.join(map(str, stages))}: close their pipeline first")
        if not {worker.name for worker in self.workers} - {*names}:
            raise StateError("a cluster keeps at least one worker; close it to end all")
        self._supervisor.remove(names)

    # --- what workers report; runs on the monitor's thread ---

    def _listen(self) -> None:
        while self._liveness.anybody or not self._ending:
            for source, kind, payload in self._group.monitor.poll():
                if not self._group.handle(source, kind, payload):
                    self._handle(source, kind, payload)
            self._group.housekeeping()

    def _handle(self, source: Any, kind: str, payload: Any) -> None:
        if kind == "beat":
            finished, doing, memory = payload
            self._beats[source.name] = finished, doing, memory, time.time()
        elif kind == "died" and self._group.newcomers.discard(source):
            pass
        elif kind == "died":
            self._lost(source, payload, kind)
            self._liveness.end(source)
        elif kind == "silent":
            self._lost(source, f"has given no sign of life for {payload:.1f} s ({source.state()})", kind)
        if kind in REPORTS:
            self._supervisor.handle(source, kind, payload)

    def _lost(self, member: Member, how: str, kind: str) -> None:
        """Note that a process has died or does not answer, or is removed; the main thread calls this, too."""
        if self._ending or self._liveness.is_lost(member):
            return
        stages, role = self.stages_on(member.name), self._role(member.name)
        who = f"{role} on {describe(member)}" if role else describe(member)
        last = self._group.logs.tail(member.name)
        story = f"{who} {how}.\n" + (f"Its last lines:\n{last}\n" if last else "It has printed nothing.\n")
        if kind != "removed" and member.name in (spare.name for spare in self.spares):
            log.warning("%sIt was idle: training goes on with a spare less", story)
        after = "Its layers went with it: launch (or connect) again and make a new Pipeline"
        if self.heal:
            after = "Another process takes its place as soon as the cluster is used again"
        error = WorkerLost(story + after, worker=member.name, stages=stages, host=member.host, pid=member.pid)
        self._liveness.lose(member, error)
        self.events.append(ClusterEvent(kind, member.name, member.host, member.pid, how))
        self.transport.lose(member.name, error)
        self._group.cut(member)

    def relabel(self) -> None:
        """Note where stages are now, for labels and messages; pipelines call it when stages come, move or go."""
        if self._ending:
            return
        pipelines = list(self.pipelines)
        # Replaced as a whole, because the monitor's thread reads it.
        self._stages = {
            worker.name: tuple(sorted({stage for pipe in pipelines for stage in pipe.stages_on(worker.name)}))
            for worker in self.workers
        }
        self._replicas = {
            worker.name: tuple(
                sorted({index for pipe in pipelines if (index := pipe.replica_of(worker.name)) is not None})
            )
            for worker in self.workers
        }

    def stages_on(self, worker: str) -> tuple[int, ...]:
        """Return the stages that ``worker`` holds, of all pipelines."""
        return self._stages.get(worker, ())

    def _role(self, worker: str) -> str:
        """Return ``stage 0, 2`` or, of several replicas, ``stage 0, 2 of replica 1``; '' without stages."""
        stages, replicas = self.stages_on(worker), self._replicas.get(worker, ())
        replica = f" of replica {', '.join(map(str, replicas))}" if replicas else ""
        return f"stage {', '.join(map(str, stages))}{replica}" if stages else ""

    def _label(self, worker: str) -> str:
        """Return the prefix of what a worker prints."""
        member = self._group.members[worker]
        return f"[{self._role(worker) or worker} {member.host}:{member.pid}]"

    # --- tables ---

    def status(self) -> list[WorkerStatus]:
        """Return what every worker and spare holds and did last, by their signs of life; no worker is asked."""
        found, lost, workers = [], self._liveness.lost, self.workers
        for worker in workers + self.spares:
            finished, doing, memory, heard = self._beats.get(worker.name, (0, "", 0, None))
            stages, spare = self.stages_on(worker.name), worker not in workers
            found.append(
                WorkerStatus(worker, stages, doing, finished, memory, worker.name in lost, spare, heard)
            )  # fmt: skip
        return found

    def _rows(self) -> list[list[str]]:
        rows = []
        for one in self.status():
            worker, state = one.worker, "lost" if one.lost else one.doing or "not reported yet"
            stages = ", ".join(map(str, one.stages)) or "-"
            place, size = f"{worker.host}:{worker.pid}", _tables.mebibytes(one.memory) if one.memory else "?"
            rows.append([worker.name, place, worker.device, stages, size, str(one.finished), state])
        return rows

    _HEADER = ("worker", "host:pid", "device", "stages", "memory", "tasks done", "now")

    def _title(self) -> str:
        lost = self._liveness.lost
        state = "closed" if self._closed else f"{len(lost)} lost" if lost else "live"
        spares = f", {len(self.spares)} spare{'s' * (len(self.spares) > 1)}" if self.spares else ""
        came = f", {waiting} waiting" if (waiting := self._group.newcomers.waiting) else ""
        return f"Cluster({len(self.workers)} workers{spares}{came}, {state})"

    def __repr__(self) -> str:
        return f"{self._title()}\n{_tables.text(self._HEADER, self._rows())}"

    def _repr_html_(self) -> str:
        return _tables.markup(self._title(), self._HEADER, self._rows())

    # --- the end ---

    def _drain(self) -> None:
        """Let messages under way arrive: contexts being released, RRefs being deleted."""
        if self.healthy:
            until = time.monotonic() + _DRAIN_SECONDS
            everybody = self.workers + self.spares
            for reply in [self.transport.call(worker.name, "progress") for worker in everybody]:
                self.transport.wait([reply], max(0.0, until - time.monotonic()))

    def close(self) -> None:
        """End the workers, within 2 s whatever their state. Closing twice is allowed; a fork's call does nothing."""
        if self._closed or self._inherited:
            return
        try:
            with contextlib.suppress(StateError):  # torch RPC was shut down by somebody else
                self._drain()
            self._ending = True  # from here on a death is expected, and labels stay
            for pipeline in list(self.pipelines):
                pipeline.close()
        finally:
            self._ending = self._closed = True
            self._end()

    def _end(self) -> None:
        members = list(self._group.members.values())
        for member in members:
            closed = WorkerLost(f"{member.name}: the cluster was closed", worker=member.name)
            self.transport.lose(member.name, closed)
        try:
            for member in filter(self._liveness.is_alive, members):
                # A lost worker would not read "stop": it is dead, stopped or stuck.
                member.kill() if self._liveness.is_lost(member) else member.send("stop")
            self._liveness.wait_for_ends(members, _STOP_SECONDS)
        finally:  # a second Ctrl-C ends the waiting, not the ending
            for member in filter(self._liveness.is_alive, members):
                member.kill()
            self._liveness.wait_for_ends(members, _KILL_SECONDS)
            self.transport.leave()
            self._liveness.end_all()
            self._group.monitor.wake()
            self._thread.join()  # ends once awake: nobody is alive; what it calls waits at most for our own output
            self._group.close()
