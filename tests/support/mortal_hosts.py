"""A cluster without processes whose workers die, some of them with their hosts."""

from __future__ import annotations

from typing import Any

from rpcpipe.cluster.kept_descriptor import KeptDescriptor
from rpcpipe.errors import WorkerLost
from support.mortal_cluster import MortalCluster


class HostedMemory(KeptDescriptor):
    """What a host keeps, until it dies."""

    alive = True

    def __init__(self, pid: int, descriptor: int, cluster: MortalHosts, host: str) -> None:
        super().__init__(pid, descriptor)
        self._cluster, self._host = cluster, host

    @property  # type: ignore[no-redef]
    def alive(self) -> bool:  # noqa: F811
        return self._host not in self._cluster.gone


class MortalHosts(MortalCluster):
    """Every worker is on a host of its own; one death in ``hosts`` takes the host along, if that can be healed."""

    def __init__(self, workers: int, seed: int = 0, *, hosts: int = 1, **options: Any) -> None:
        super().__init__(workers, seed, **options)
        self.spread = True
        self.gone: set[str] = set()
        self.places = {worker.name: f"host{worker.rank}" for worker in self.workers}
        self.losses, self._hosts, self._made = 0, hosts, workers

    def hosts(self) -> dict[str, str]:
        return dict(self.places)

    def keep(self, worker: str, pid: int, descriptor: int) -> HostedMemory:
        if worker in self.dead:  # its descriptors are closed, and their numbers may be others' now
            raise WorkerLost(f"{worker} has died", worker=worker)
        return HostedMemory(pid, descriptor, self, self.places[worker])

    def kill(self, name: str) -> None:
        safe = not self.dead and all(pipe.history.safe for pipe in self.pipelines)
        if safe and self.random.randrange(self._hosts) == 0:
            self.lose_host(name)
        super().kill(name)

    def lose_host(self, name: str) -> None:
        """Let ``name`` die with its host; another one takes its place."""
        self.losses += 1
        self.gone.add(self.places[name])
        self._made += 1
        self.places[name] = f"host{self._made}"
        super().kill(name)
