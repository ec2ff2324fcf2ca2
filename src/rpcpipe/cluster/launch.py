"""Start workers on this host (``rp.launch``), and keep the process's live cluster."""

from __future__ import annotations

import atexit
import importlib
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rpcpipe._arguments import require_count, require_path, require_seconds
from rpcpipe.cluster.cluster import Cluster
from rpcpipe.cluster.monitor import Monitor
from rpcpipe.cluster.process import WorkerProcess, strings, worker_environment
from rpcpipe.cluster.rendezvous import Member, Starter, Worker, WorkerGroup, form, worker_names
from rpcpipe.cluster.template import PRELOADED, templates
from rpcpipe.cluster.worker_logs import WorkerLogs
from rpcpipe.errors import ArgumentError, StateError, require_whole, shown
from rpcpipe.transport.rpc import this_process
from rpcpipe.transport.user_pickling import worker_imports

_INTERFACE = "lo"
_HEAL_TRIES = 3
# More than any host runs; a number that is mistyped is refused before names are made for it.
_MOST_WORKERS, _MOST_THREADS = 1024, 4096


class LiveCluster:
    """The one cluster that a process may have alive; ``shape`` is anything that says how it was made.

    ``owner``: the process that has had one, 0 before the first; torch RPC does not survive a fork of it.
    """

    def __init__(self) -> None:
        self._cluster: Cluster | None = None
        self._shape: Any = None
        self._names: list[str] = []
        self.owner = 0

    def reuse(self, shape: Any) -> Cluster | None:
        """Return the live cluster if it is healthy and as ``shape`` says, also by now; close any other.

        Raises StateError in a fork of a process that has had one.
        """
        if self.owner not in (0, os.getpid()):
            raise StateError(
                f"this process ({os.getpid()}) is a fork of one that has had workers ({self.owner}), and torch RPC does"
                " not survive a fork; start it by multiprocessing's 'spawn' to give it workers of its own"
            )
        self.owner = os.getpid()
        if self._cluster is not None and not (
            self._cluster.healthy and self._shape == shape and self._names == _names(self._cluster)
        ):
            self._cluster.close()
            self._cluster = None
        return self._cluster

    def keep(self, cluster: Cluster, shape: Any) -> Cluster:
        """Make ``cluster`` the live one, and return it."""
        self._cluster, self._shape, self._names = cluster, shape, _names(cluster)
        return cluster

    def close(self) -> None:
        """Close the live cluster."""
        if self._cluster is not None:
            self._cluster.close()


def _names(cluster: Cluster) -> list[str]:
    return [worker.name for worker in cluster.workers + cluster.spares]


live = LiveCluster()


@atexit.register
def _close_all() -> None:
    """Leave nothing behind where the driver ends without ``close`` (and let torch not abort it).

    A fork of the driver has neither the threads that torch's agent would wait for, nor workers of its own.
    """
    if live.owner == os.getpid():
        live.close()
        this_process.shutdown()
        templates.close()


def launch(
    workers: int,
    *,
    device: str = "auto",
    threads: int | None = None,
    timeout: float = 60.0,
    log_dir: str | os.PathLike[str] | None = None,
    spares: int = 0,
    heal: bool | int = True,
) -> Cluster:
    """Start ``workers`` processes on this host and return their Cluster; this process is the driver.

    ``device``: "cpu", "cuda" (worker i on GPU i modulo their number), "cuda:1", or "auto".
    ``threads``: torch's threads per worker, default cores // workers. ``timeout``: seconds without
    any progress after which a wait raises DeadlineExceeded. ``log_dir`` gets a file per worker with
    what it prints; all of it arrives on this process's stdout and stderr as well. ``spares``: further
    workers, which stay idle (``cluster.spares``) until one takes a dead worker's place. ``heal``: how often a step
    that has lost workers may be tried again with new ones in their place (True: 3 times; False or 0: not), kept as
    ``cluster.heal``.

    A live cluster that was launched alike is returned again; another one is closed first. Raises
    ArgumentError for arguments that cannot work and RendezvousError when workers do not start.
    """
    workers = require_count("workers", workers, _MOST_WORKERS)
    spares = require_count("spares", spares, _MOST_WORKERS, least=0)
    cores = os.cpu_count() or 1
    count = max(1, cores // workers) if threads is None else require_count("threads", threads, _MOST_THREADS)
    timeout = require_seconds("timeout", timeout)
    devices = _devices(device, workers + spares)
    directory = None if log_dir is None else require_path("log_dir", log_dir).absolute()
    names = [*worker_names(workers), *(f"spare{index}" for index in range(spares))]
    tries = heal_tries(heal)
    shape = (names, devices, count, timeout, directory, tries)
    if (cluster := live.reuse(shape)) is not None:
        return cluster
    templates.prepare(worker_environment(count))
    preloading = _preload()
    cluster = live.keep(_start(workers, names, device, count, timeout, directory, tries), shape)
    preloading.join()  # bounded by the imports; it takes no longer than the first workers do
    return cluster


def _preload() -> threading.Thread:
    """Import what this process's optimizers need while the template does so, too; return the thread that does it.

    On another thread than the main one, because a Ctrl-C amid an import leaves half-imported modules behind.
    """

    def load() -> None:
        for name in PRELOADED:
            importlib.import_module(name)

    thread = threading.Thread(target=load, name="rpcpipe-preload")
    thread.start()
    return thread


def heal_tries(heal: bool | int) -> int:
    """Return how often a step may be tried again; raises ArgumentError for what is neither a bool nor a number >= 0."""
    return _HEAL_TRIES * heal if isinstance(heal, bool) else require_whole("heal", heal, least=0)


def _devices(device: str, workers: int) -> list[str]:
    """Return every worker's device; raises ArgumentError for one that is not there."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind = ("cuda" if gpus else "cpu") if device == "auto" else device
    wanted = _parsed(kind)
    if wanted.type not in ("cpu", "cuda"):
        raise ArgumentError(f"device={device!r}: rpcpipe runs on cpu and cuda")
    if wanted.type == "cpu":
        return ["cpu"] * workers
    if (wanted.index or 0) >= gpus:
        raise ArgumentError(f"device={device!r} is not there: this host has {gpus} CUDA devices; use device='cpu'")
    return [kind if wanted.index is not None else f"cuda:{index % gpus}" for index in range(workers)]


def _parsed(device: Any) -> torch.device:
    """Return the device of that name; raises ArgumentError for what is no name of one."""
    try:
        if isinstance(device, str):
            return torch.device(device)
    except RuntimeError:
        pass
    raise ArgumentError(f"device must be 'auto', 'cpu', 'cuda' or such as 'cuda:1', not {shown(device)}")


def _start(
    workers: int, names: list[str], device: str, threads: int, timeout: float, directory: Path | None, heal: int
) -> Cluster:
    devices = dict(zip(names, _devices(device, len(names)), strict=True))
    group = WorkerGroup(Monitor(), WorkerLogs(directory), timeout, names)
    path = strings(sys.path)
    worker_imports.adopt(path)
    local = {"threads": threads, "interface": _INTERFACE, "path": path, "argv": strings(sys.argv)}

    def start(config: Mapping[str, Any], predecessor: Member | None = None) -> WorkerProcess:
        if predecessor is not None:
            predecessor.close()
        return WorkerProcess({**config, **local})

    group.starter = Starter(start, lambda index: _devices(device, index + 1)[index])
    try:
        for name in names:
            group.members[name] = member = start(group.worker_config(name, devices[name]))
            group.monitor.add(member)
    except BaseException as error:
        group.abandon(str(error))
        raise
    form(group, _INTERFACE)
    started = [
        Worker(member.name, rank, member.host, member.pid, devices[member.name])
        for rank, member in enumerate(group.members.values(), 1)
    ]
    return Cluster(group, started[:workers], started[workers:], heal=heal)
