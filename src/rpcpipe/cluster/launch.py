"""Workers on this host: ``rp.launch``."""

from __future__ import annotations

import atexit
import importlib
import os
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import torch

from rpcpipe.cluster.cluster import Cluster, Worker
from rpcpipe.cluster.group import Group, names_of
from rpcpipe.cluster.monitor import Watch
from rpcpipe.cluster.process import WorkerProcess, environment
from rpcpipe.cluster.rendezvous import form
from rpcpipe.cluster.template import PRELOADED, templates
from rpcpipe.cluster.worker_logs import Logs
from rpcpipe.transport import rpc

_INTERFACE = "lo"

_live: Cluster | None = None
_shape: weakref.WeakKeyDictionary[Cluster, Any] = weakref.WeakKeyDictionary()


@atexit.register
def _close_live() -> None:
    """A driver that ends without ``close`` leaves nothing behind (and torch does not abort it)."""
    if _live is not None:
        _live.close()
    rpc.shutdown()
    templates.close()


def adopt(cluster: Cluster, shape: Any) -> Cluster:
    """``cluster`` is this process's live one now."""
    global _live
    _live, _shape[cluster] = cluster, shape
    return cluster


def live(shape: Any) -> Cluster | None:
    """The live cluster if it was made as ``shape`` says; any other is closed."""
    global _live
    if _live is not None and not (_live.healthy and _shape.get(_live) == shape):
        _live.close()
        _live = None
    return _live


def launch(
    workers: int,
    *,
    device: str = "auto",
    threads: int | None = None,
    timeout: float = 60.0,
    log_dir: str | os.PathLike[str] | None = None,
    spares: int = 0,
) -> Cluster:
    """Spawn ``workers`` processes on this host; this process is the driver.

    ``device``: "cpu", "cuda" (worker i on GPU i modulo their number), "cuda:1", or "auto".
    ``threads``: torch's threads per worker, default cores // workers. ``timeout``: seconds without
    any progress after which a wait raises DeadlineExceeded. ``log_dir`` gets a file per worker with
    what it prints; all of it arrives on this process's stdout and stderr as well. ``spares``: further
    workers, which stay idle (``cluster.spares``). A live cluster that
    fits is returned again; one that does not is closed first. Raises ValueError for arguments that
    cannot work and RendezvousError when workers do not start.
    """
    if workers < 1 or spares < 0:
        raise ValueError(f"workers must be at least 1 and spares 0, not {workers} and {spares}")
    count = max(1, (os.cpu_count() or 1) // workers) if threads is None else threads
    if count < 1 or timeout <= 0:
        raise ValueError(f"threads and timeout must be positive, not {threads} and {timeout}")
    templates.prepare(environment(count))
    preloading = _preload()
    devices = _devices(device, workers + spares)
    directory = None if log_dir is None else Path(log_dir).absolute()
    names = [*names_of(workers), *(f"spare{index}" for index in range(spares))]
    shape = (names, devices, count, timeout, directory)
    cluster = live(shape)
    if cluster is None:
        placed = dict(zip(names, devices, strict=True))
        cluster = adopt(_start(workers, placed, count, timeout, directory), shape)
    preloading.join()  # bounded by the imports; it takes no longer than the first workers do
    return cluster


def _preload() -> threading.Thread:
    """Import what this process's optimizers need, too, while the template does so.

    In a thread of its own: a Ctrl-C in the midst of an import would leave half-imported modules behind, for ever.
    """

    def load() -> None:
        for name in PRELOADED:
            importlib.import_module(name)

    thread = threading.Thread(target=load, name="rpcpipe-preload")
    thread.start()
    return thread


def _devices(device: str, workers: int) -> list[str]:
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


def _start(workers: int, devices: dict[str, str], threads: int, timeout: float, directory: Path | None) -> Cluster:
    group = Group(Watch(), Logs(directory), timeout, list(devices))
    here = {"threads": threads, "interface": _INTERFACE, "path": sys.path, "argv": sys.argv}
    try:
        for name, device in devices.items():
            group.members[name] = member = WorkerProcess({**group.config(name, device), **here})
            group.watch.add(member)
    except BaseException as error:
        group.abandon(str(error))
        raise
    form(group, _INTERFACE)
    found = [
        Worker(member.name, rank, member.host, member.pid, devices[member.name])
        for rank, member in enumerate(group.members.values(), 1)
    ]
    return Cluster(group, found[:workers], found[workers:])
