"""Start workers on this host (``rp.launch``), and keep the process's live cluster."""

from __future__ import annotations

import atexit
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rpcpipe._arguments import require_count, require_path, require_seconds
from rpcpipe.cluster.cluster import Cluster
from rpcpipe.cluster.monitor import Monitor
from rpcpipe.cluster.process import strings, worker_environment
from rpcpipe.cluster.rendezvous import Worker, WorkerGroup, form, worker_names
from rpcpipe.cluster.starters import LocalStarter, devices
from rpcpipe.cluster.template import templates
from rpcpipe.cluster.worker_logs import WorkerLogs
from rpcpipe.errors import ArgumentError, StateError, require, require_whole
from rpcpipe.transport.roster import DRIVERS_SEAT
from rpcpipe.transport.rpc import this_process
from rpcpipe.transport.user_pickling import worker_imports

_INTERFACE = "lo"
_HEAL_TRIES = 3
SHRINK = "shrink"
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


def refuse_on_worker(function: str) -> None:
    """Raise StateError if this process is a worker, or a fork of one: only a driver has a cluster."""
    served = this_process.served
    if served is not None and served[0].own != DRIVERS_SEAT:
        raise StateError(
            f"{function} was called on the worker {served[0].own.wire} (pid {os.getpid()}), perhaps by a module that it"
            f' has imported: only the driver makes a cluster. Call it in the script, under `if __name__ == "__main__":`'
            " or in a function, not in a module that layers or functions for workers come from"
        )


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
    heal: bool | int | Literal["shrink"] = True,
) -> Cluster:
    """Start ``workers`` processes on this host and return their Cluster; this process is the driver.

    ``device``: "cpu", "cuda" (worker i on GPU i modulo their number), "cuda:1", or "auto".
    ``threads``: torch's threads per worker, default cores // workers. ``timeout``: seconds without
    any progress after which a wait raises DeadlineExceeded. ``log_dir`` gets a file per worker with
    what it prints; all of it arrives on this process's stdout and stderr as well. ``spares``: further
    workers, which stay idle (``cluster.spares``) until one takes a dead worker's place. ``heal``: how often a step
    that has lost workers may be tried again with new ones in their place (True and "shrink", which means more in
    ``rp.connect``: 3 times; False or 0: not), kept as ``cluster.heal``.

    A live cluster that was launched alike is returned again; another one is closed first. Raises
    ArgumentError for arguments that cannot work, StateError in one of several ranks of torchrun (each would train a
    copy; that is for ``rp.connect``), and RendezvousError when workers do not start.
    """
    refuse_on_worker("rp.launch")
    _check_alone(os.environ)
    workers = require_count("workers", workers, _MOST_WORKERS)
    spares = require_count("spares", spares, _MOST_WORKERS, least=0)
    cores = os.cpu_count() or 1
    count = max(1, cores // workers) if threads is None else require_count("threads", threads, _MOST_THREADS)
    timeout = require_seconds("timeout", timeout)
    placed = devices(device, workers + spares)
    directory = None if log_dir is None else require_path("log_dir", log_dir).absolute()
    names = [*worker_names(workers), *(f"spare{index}" for index in range(spares))]
    tries = heal_tries(heal)
    shape = (names, placed, count, timeout, directory, tries)
    if (cluster := live.reuse(shape)) is not None:
        return cluster
    require_descriptors(workers + spares)
    templates.prepare(worker_environment(count))
    return live.keep(_start(workers, names, device, count, timeout, directory, tries), shape)


def _check_alone(environ: Mapping[str, str]) -> None:
    """Raise StateError if this process is one of several that torchrun, or the like, has started of one script."""
    rank, size = environ.get("RANK", ""), environ.get("WORLD_SIZE", "")
    require(
        not (rank.isdecimal() and size.isdecimal() and int(size) > 1),
        f"this process is rank {rank} of {size} (RANK, WORLD_SIZE; torchrun sets them), and rp.launch in each of them"
        " would train as many copies of the model; use rp.connect(), which makes rank 0 the driver and the others"
        " workers, or start the script by python alone (unset RANK and WORLD_SIZE)",
        error=StateError,
    )


def heal_tries(heal: bool | int | str) -> int:
    """Return how often a step may be tried again; raises ArgumentError for what ``heal`` cannot be."""
    if heal == SHRINK:
        return _HEAL_TRIES
    if isinstance(heal, str):
        raise ArgumentError(f"heal={heal!r} is neither True, False, a number of tries from 0 on, nor {SHRINK!r}")
    return _HEAL_TRIES * heal if isinstance(heal, bool) else require_whole("heal", heal, least=0)


# Descriptors of a driver for each process of its group: a control channel, two pipes, two pidfds, six connections of
# torch RPC and two lanes; and those that it needs in any case, or for some time.
_PER_PROCESS, _BESIDE = 14, 32


def require_descriptors(processes: int) -> None:
    """Raise StateError where this process may not open what a group with ``processes`` workers takes.

    torch ends the process that runs out of descriptors (``std::bad_alloc``, SIGABRT) instead of raising.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    needed = used + _PER_PROCESS * processes + _BESIDE
    if soft != resource.RLIM_INFINITY and soft < needed:
        enough = hard == resource.RLIM_INFINITY or hard >= needed
        how = (
            f"`ulimit -n {needed}` before the start" if enough else f"ask for a higher hard limit, which is {hard} now"
        )
        raise StateError(
            f"this process may open {soft} files (ulimit -n) and has {used} open; with {processes} workers it needs"
            f" {needed}: {how}, or launch fewer workers"
        )


def _start(
    workers: int, names: list[str], device: str, threads: int, timeout: float, directory: Path | None, heal: int
) -> Cluster:
    placed = dict(zip(names, devices(device, len(names)), strict=True))
    worker_imports.adopt(strings(sys.path))
    starter = LocalStarter(device, threads, _INTERFACE)
    group = WorkerGroup(Monitor(), WorkerLogs(directory), timeout, names, starter)
    try:
        for name in names:
            group.members[name] = member = starter.start(group.worker_config(name, placed[name]), None)
            group.monitor.add(member)
    except BaseException as error:
        group.abandon(str(error))
        raise
    form(group, _INTERFACE)
    started = [
        Worker(member.name, rank, member.host, member.pid, placed[member.name])
        for rank, member in enumerate(group.members.values(), 1)
    ]
    return Cluster(group, started[:workers], started[workers:], heal=heal)
