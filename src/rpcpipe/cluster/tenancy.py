"""What a cluster and the pipelines that use it know of each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableSet, Sequence
from typing import Any, Protocol

from rpcpipe.cluster.liveness import ClusterEvent, WorkerStatus
from rpcpipe.cluster.rendezvous import Kept, Worker
from rpcpipe.transport.base import Transport


class Tenant(Protocol):
    """What a cluster knows of a pipeline that uses it."""

    def close(self) -> None: ...

    def revive(self) -> None:
        """Let successors of dead workers go on with what those have kept of it; raises WorkerLost if they cannot."""
        ...

    def stages_on(self, worker: str) -> Sequence[int]:
        """Return the stages that ``worker`` holds."""
        ...

    def replica_of(self, worker: str) -> int | None:
        """Return the replica that ``worker`` belongs to; None where there is only one."""
        ...


class PipelineCluster(Protocol):
    """What a pipeline uses of a cluster. ``Cluster`` has it, and so has a cluster without processes, for tests."""

    @property
    def workers(self) -> Sequence[Worker]:
        """Return the workers that can hold stages."""
        ...

    @property
    def stand_ins(self) -> Sequence[Worker]:
        """Return those of ``workers`` that are on the driver's host because their own are lost."""
        ...

    @property
    def timeout(self) -> float:
        """Return the seconds without any progress after which a wait raises DeadlineExceeded."""
        ...

    @property
    def transport(self) -> Transport:
        """Return what carries messages to the workers."""
        ...

    @property
    def heal(self) -> int:
        """Return how often a call in which workers have died is made again; with 0 a death ends the cluster."""
        ...

    @property
    def pipelines(self) -> MutableSet[Tenant]:
        """Return the pipelines that use the cluster; a pipeline adds itself and discards itself."""
        ...

    @property
    def open(self) -> bool:
        """Return whether the cluster takes calls: it is not closed, and this process's own."""
        ...

    @property
    def healthy(self) -> bool:
        """Return whether the cluster is open and no worker has died."""
        ...

    def check(self) -> None:
        """Raise StateError if the cluster is closed, WorkerLost if a worker has died."""
        ...

    def call(self, worker: Worker, function: Callable[..., Any], /, *args: Any) -> Any:
        """Return ``function(*args)``, run on ``worker``; raises StageError, TimeoutError or WorkerLost."""
        ...

    def keep(self, worker: str, pid: int, descriptor: int) -> Kept:
        """Keep number ``descriptor`` of ``worker``, process ``pid``, open; raises OSError if it has died."""
        ...

    @property
    def spread(self) -> bool:
        """Return whether the death of a host of workers can be healed at all."""
        ...

    def hosts(self) -> Mapping[str, str]:
        """Return by worker what it dies with: the host agent that has started it, or the driver's host.

        Of two agents on one host each counts for itself; ``Worker.host`` says which host it is.
        """
        ...

    def stages_on(self, worker: str) -> Sequence[int]:
        """Return the stages that ``worker`` holds, of all pipelines."""
        ...

    def remove_workers(self, *workers: str | int | Worker) -> None:
        """End ``workers``; raises StateError for one that holds stages."""
        ...

    @property
    def events(self) -> Sequence[ClusterEvent]:
        """Return the deaths and replacements so far."""
        ...

    def status(self) -> Sequence[WorkerStatus]:
        """Return what every worker and spare holds and did at its last sign of life."""
        ...

    def relabel(self) -> None:
        """Ask every pipeline again for its stages, which have come, moved or gone."""
        ...


def kept_apart(cluster: PipelineCluster, names: Sequence[str]) -> list[str]:
    """Return by worker of ``names`` what its snapshot must not die with: its machine.

    Where that is one for all, what each dies with, a host agent: machines die less often than processes.
    """
    machine = {worker.name: worker.host for worker in cluster.workers}
    machines, hosts = [machine[name] for name in names], cluster.hosts()
    return machines if len(set(machines)) > 1 else [hosts[name] for name in names]
