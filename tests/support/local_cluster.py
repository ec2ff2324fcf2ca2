"""A cluster without processes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from rpcpipe.transport.local import LocalTransport
from rpcpipe.worker.executor import Executor


class LocalCluster:
    """Workers in this process over the shuffling transport; enough of a Cluster for a Pipeline."""

    def __init__(
        self, workers: int, seed: int = 0, *, timeout: float = 5.0, drop: Callable[[str, str], bool] | None = None
    ) -> None:
        self.transport = LocalTransport(seed, drop=drop)
        self.workers = [SimpleNamespace(name=f"worker{index}", host="elsewhere") for index in range(workers)]
        self.timeout = timeout
        self.healthy = True
        self.pipelines: set[Any] = set()
        for worker in self.workers:
            executor = Executor(worker.name, self.transport, device=torch.device("cpu"), threads=1)
            self.transport.serve(worker.name, executor)

    def relabel(self) -> None:
        pass

    def check(self) -> None:
        pass
