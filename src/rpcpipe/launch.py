"""Bringing a driver and its workers together, and taking them apart."""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import sys
import tempfile
import time
import uuid
import weakref
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cloudpickle
import torch
from torch.distributed import FileStore  # type: ignore[attr-defined]

from rpcpipe.errors import Failure, RendezvousError, RpcPipeError, StageError, WorkerLost
from rpcpipe.process import Watch, WorkerProcess, end
from rpcpipe.transport import rpc

_DRIVER = "driver"
_STOP_SECONDS = 1.0
_DRAIN_SECONDS = 0.3


@dataclass(frozen=True)
class Worker:
    """Where a worker is."""

    name: str
    rank: int
    host: str
    pid: int
    device: str


class _Closable(Protocol):
    def close(self) -> None: ...


class Cluster:
    """Live workers; made by ``rp.launch``. A context manager that closes them."""

    def __init__(self, processes: list[WorkerProcess], workers: list[Worker], generation: str, timeout: float) -> None:
        self.workers = tuple(workers)
        self.timeout = timeout
        self.transport = rpc.RpcTransport(generation)
        self.pipelines: weakref.WeakSet[_Closable] = weakref.WeakSet()
        self._processes = processes
        self._watch = Watch(processes, self._lost)
        self._dead: dict[str, WorkerLost] = {}
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._dead)} lost" if self._dead else "live"
        rows = "\n".join(f"  {w.name:<10} rank {w.rank}  {w.host}:{w.pid}  {w.device}" for w in self.workers)
        return f"Cluster({len(self.workers)} workers, {state})\n{rows}"

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def healthy(self) -> bool:
        """Open, and no worker has died."""
        return not self._closed and not self._dead

    def check(self) -> None:
        """Raise unless the cluster can take work."""
        if self._closed:
            raise RpcPipeError("the cluster is closed; call rp.launch again")
        for lost in self._dead.values():
            raise lost

    def call(self, worker: str | int | Worker, function: Callable[..., Any], *args: Any) -> Any:
        """``function(*args)`` on a worker (its name, rank from 1, or entry of ``workers``); the result."""
        self.check()
        name = self._name(worker)
        reply = self.transport.post(name, "run", cloudpickle.dumps((function, args)))
        done, _ = self.transport.wait([reply], self.timeout)
        if not done:
            raise TimeoutError(f"{name} did not answer within {self.timeout:g} s")
        outcome = reply.result()
        if isinstance(outcome, Failure):
            raise StageError(outcome)
        return cloudpickle.loads(outcome)

    def _name(self, worker: str | int | Worker) -> str:
        for known in self.workers:
            if worker in (known, known.name, known.rank):
                return known.name
        raise ValueError(f"no worker {worker!r}; there are {', '.join(known.name for known in self.workers)}")

    def _lost(self, process: WorkerProcess) -> None:
        """Runs on the watch's thread."""
        error = WorkerLost(
            f"{process.name} (pid {process.pid}) {process.death()}; its output above may say why."
            " Close the cluster and rp.launch again",
            worker=process.name,
        )
        self._dead[process.name] = error
        self.transport.lose(process.name, error)

    def _drain(self) -> None:
        """Let what is under way arrive: contexts being released, RRefs being deleted."""
        if self.healthy:
            asked = {self.transport.post(worker.name, "progress") for worker in self.workers}
            wait(asked, _DRAIN_SECONDS)

    def close(self) -> None:
        """End the workers; returns within 2 s whatever their state. Closing twice is allowed."""
        global _live
        if self._closed:
            return
        for pipeline in list(self.pipelines):
            pipeline.close()
        self._drain()
        self._closed = True
        _live = None if _live is self else _live
        self._watch.close()
        for process in self._processes:
            self.transport.lose(
                process.name, WorkerLost(f"{process.name}: the cluster was closed", worker=process.name)
            )
        # First our side of every connection, so that the agent does not report theirs as broken.
        rpc.leave()
        end(self._processes, _STOP_SECONDS)


_live: Cluster | None = None


@atexit.register
def _close_live() -> None:
    """A driver that ends without ``close`` leaves nothing behind (and torch does not abort it)."""
    if _live is not None:
        _live.close()


def launch(
    workers: int,
    *,
    device: str = "auto",
    threads: int | None = None,
    timeout: float = 60.0,
) -> Cluster:
    """Spawn ``workers`` processes on this host; this process is the driver.

    ``device``: "cpu", "cuda" (worker i on GPU i modulo their number), "cuda:1", or "auto".
    ``threads``: torch's threads per worker, default cores // workers. ``timeout``: seconds without
    any progress after which a wait raises DeadlineExceeded. A live cluster that fits is returned
    again; one that does not is closed first. Raises ValueError for arguments that cannot work and
    RendezvousError when workers do not start.
    """
    devices = _devices(device, workers)
    count = max(1, (os.cpu_count() or 1) // workers) if threads is None else threads
    if count < 1 or timeout <= 0:
        raise ValueError(f"threads and timeout must be positive, not {threads} and {timeout}")
    shape = (devices, count, timeout)
    global _live
    if _live is not None:
        if _live.healthy and _shape.get(_live) == shape:
            return _live
        _live.close()
    _live = _spawn(devices, count, timeout)
    _shape[_live] = shape
    return _live


_shape: weakref.WeakKeyDictionary[Cluster, Any] = weakref.WeakKeyDictionary()


def _devices(device: str, workers: int) -> list[str]:
    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind = ("cuda" if gpus else "cpu") if device == "auto" else device
    wanted = torch.device(kind)
    if wanted.type not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r}: rpcpipe runs on cpu and cuda")
    if wanted.type == "cpu":
        return ["cpu"] * workers
    if (wanted.index or 0) >= gpus:
        raise ValueError(f"device={device!r} is not there: this host has {gpus} CUDA devices; use device='cpu'")
    return [kind if wanted.index is not None else f"cuda:{index % gpus}" for index in range(workers)]


def _spawn(devices: list[str], threads: int, timeout: float) -> Cluster:
    generation = uuid.uuid4().hex
    directory = Path(tempfile.mkdtemp(prefix="rpcpipe-"))  # mode 0700
    processes: list[WorkerProcess] = []
    try:
        for rank, device in enumerate(devices, 1):
            processes.append(
                WorkerProcess(
                    {
                        "name": f"worker{rank - 1}",
                        "rank": rank,
                        "world_size": len(devices) + 1,
                        "device": device,
                        "threads": threads,
                        "timeout": timeout,
                        "generation": generation,
                        "store": str(directory / "store"),
                        "path": sys.path,
                        "argv": sys.argv,
                    }
                )
            )
        _rendezvous(processes, directory / "store", timeout)
    except BaseException:
        end(processes, 0.0)
        rpc.leave()
        raise
    finally:
        # Everybody has read everybody's address by now.
        shutil.rmtree(directory, ignore_errors=True)
    host = socket.gethostname()
    workers = [Worker(p.name, rank, host, p.pid, devices[rank - 1]) for rank, p in enumerate(processes, 1)]
    return Cluster(processes, workers, generation, timeout)


def _rendezvous(processes: list[WorkerProcess], store: Path, timeout: float) -> None:
    until = time.monotonic() + timeout
    for process in processes:
        process.expect("ready", max(0.1, until - time.monotonic()))
    for process in processes:
        process.say("join")
    world_size = len(processes) + 1
    try:
        rpc.join(FileStore(str(store), world_size), _DRIVER, 0, world_size, interface="lo", timeout=timeout)
    except RuntimeError as error:
        raise RendezvousError(f"the workers did not join within {timeout:g} s: {error}") from error
    for process in processes:
        process.expect("joined", max(0.1, until - time.monotonic()))
