"""A cluster without processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rpcpipe.cluster import Worker
from rpcpipe.cluster.kept_descriptor import KeptDescriptor
from rpcpipe.cluster.liveness import ClusterEvent, WorkerStatus
from rpcpipe.transport.local import LocalTransport
from rpcpipe.transport.user_pickling import loads, named_dumps
from rpcpipe.worker.executor import Executor


class CountedTransport(LocalTransport):
    """Counts its turns."""

    turns = 0

    def _turn(self) -> bool:
        self.turns += 1
        return super()._turn()


class LocalCluster:
    """A PipelineCluster of workers in this process, over the shuffling transport."""

    def __init__(
        self,
        workers: int,
        seed: int = 0,
        *,
        timeout: float = 5.0,
        drop: Callable[[str, str], bool] | None = None,
        heal: int = 0,
    ) -> None:
        self.transport = CountedTransport(seed, drop=drop)
        self.workers = [Worker(f"worker{index}", index + 1, "elsewhere", 0, "cpu") for index in range(workers)]
        self.timeout, self.spread = timeout, False
        self.open, self.healthy, self.heal = True, True, heal
        self.stand_ins: list[Worker] = []
        self.pipelines: set[Any] = set()
        self.events: list[ClusterEvent] = []
        for worker in self.workers:
            executor = Executor(worker.name, self.transport, device=torch.device("cpu"), threads=1)
            self.transport.serve(worker.name, executor)

    def hosts(self) -> dict[str, str]:
        """Return a host of its own for every worker."""
        return {worker.name: f"host{worker.rank}" for worker in self.workers}

    def status(self) -> list[WorkerStatus]:
        """Return what workers hold; they give no signs of life."""
        return [
            WorkerStatus(worker, tuple(self.stages_on(worker.name)), "", 0, 0, False, False, None)
            for worker in self.workers
        ]

    def relabel(self) -> None:
        pass

    def stages_on(self, worker: str) -> list[int]:
        return sorted({stage for pipe in self.pipelines for stage in pipe.stages_on(worker)})

    def remove_workers(self, *workers: Any) -> None:
        self.workers = [worker for worker in self.workers if worker not in workers]
        self.stand_ins = [worker for worker in self.stand_ins if worker not in workers]

    def keep(self, worker: str, pid: int, descriptor: int) -> KeptDescriptor:
        """Keep what ``worker`` has, in this process as all are."""
        return KeptDescriptor(pid, descriptor)

    def check(self) -> None:
        pass

    def call(self, worker: Worker, function: Callable[..., Any], /, *args: Any) -> Any:
        """Return ``function(*args)``, run by ``worker``'s executor."""
        reply = self.transport.call(worker.name, "run", named_dumps((function, args), "the call's function"))
        self.transport.wait([reply], self.timeout)
        return loads(reply.result())
