"""A cluster without processes whose workers die, and are replaced."""

from __future__ import annotations

import random
import socket
from typing import Any

import torch

from rpcpipe.cluster import Worker
from rpcpipe.errors import WorkerLost
from rpcpipe.worker.executor import Executor
from support.local_cluster import CountedTransport, LocalCluster


class MortalTransport(CountedTransport):
    """Kills a worker before the turns that ``plan`` says."""

    cluster: MortalCluster

    def _turn(self) -> bool:
        self.cluster.tick()
        return super()._turn()

    def bury(self, worker: str) -> None:
        """Drop what is under way to ``worker``, as no other process gets a dead one's messages."""
        self._bag = [message for message in self._bag if message.to != worker]
        self.lose(worker, WorkerLost(f"{worker} has died", worker=worker))

    def revive(self, worker: str) -> None:
        self._replies.forget(worker)


class MortalCluster(LocalCluster):
    """Kills a worker, any of them, in one of ``rarity`` turns of the transport, while ``deadly``; heals like a Cluster.

    A worker dies between two tasks; what it has sent may still arrive. With the turns of a step without deaths (see
    ``LocalCluster.transport.turns``) as ``rarity``, there are about two deaths in a step; with far fewer, every try of
    it fails, and the run takes many times as long.
    """

    def __init__(self, workers: int, seed: int = 0, *, rarity: int = 40, heal: int = 1000) -> None:
        super().__init__(workers, seed)
        self.transport: Any = MortalTransport(seed)
        self.transport.cluster = self
        self.heal, self.rarity, self.deadly = heal, rarity, False
        self.deaths = 0
        self.random = random.Random(seed)
        self.dead: set[str] = set()
        self.workers = [Worker(worker.name, worker.rank, socket.gethostname(), 0, "cpu") for worker in self.workers]
        for worker in self.workers:
            self._serve(worker.name)

    def _serve(self, name: str) -> None:
        executor = Executor(name, self.transport, device=torch.device("cpu"), threads=1)
        self.transport.serve(name, executor)

    def tick(self) -> None:
        if self.deadly and self.random.randrange(self.rarity) == 0:
            self.kill(self.random.choice(self.workers).name)

    def kill(self, name: str) -> None:
        if name not in self.dead:
            self.deaths += 1
            self.dead.add(name)
            self.transport.bury(name)

    def check(self) -> None:
        for _ in range(50):
            if not self.dead:
                return
            for name in sorted(self.dead):
                self.transport.revive(name)
                self._serve(name)
            self.workers = [
                Worker(one.name, one.rank, one.host, one.pid + (one.name in self.dead), "cpu") for one in self.workers
            ]
            self.dead.clear()
            try:
                for pipeline in list(self.pipelines):
                    pipeline.revive()
            except WorkerLost:
                if not self.dead:
                    raise
        raise AssertionError("workers die faster than they are replaced")
