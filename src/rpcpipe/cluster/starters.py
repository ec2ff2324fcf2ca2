"""Start workers of a live group: processes of this host, or by the agents of ranks."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

from rpcpipe.cluster.process import WorkerProcess, strings
from rpcpipe.cluster.remote_worker import RemoteWorker
from rpcpipe.cluster.rendezvous import Member
from rpcpipe.errors import ArgumentError, shown


def devices(device: str, workers: int) -> list[str]:
    """Return the device of each of ``workers`` on this host, for ``rp.launch(device=…)``.

    Raises ArgumentError for one that is not there.
    """
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


class LocalStarter:
    """Starts processes of this host, on ``device`` (``rp.launch``'s), with ``threads`` each, over ``interface``."""

    def __init__(self, device: str, threads: int, interface: str) -> None:
        self._device = device
        self._local = {"threads": threads, "interface": interface, "path": strings(sys.path), "argv": strings(sys.argv)}

    def start(self, config: Mapping[str, Any], predecessor: Member | None) -> WorkerProcess:
        if predecessor is not None:
            predecessor.close()
        return WorkerProcess({**config, **self._local})

    def device_of(self, index: int) -> str | None:
        return devices(self._device, index + 1)[index]

    def stand_in(self, device: str) -> str | None:
        return None  # what ends here can be started again here

    def stands_in(self, member: Member) -> bool:
        return False


class RankStarter:
    """Has the agents of ranks start workers; ``local`` starts processes that stand in where an agent is gone."""

    def __init__(self, local: LocalStarter | None) -> None:
        self._local = local

    def start(self, config: Mapping[str, Any], predecessor: Member | None) -> Member:
        # Without a stand-in an agent that is gone is asked, too: its silence is the next loss of the name.
        if isinstance(predecessor, RemoteWorker) and (predecessor.home_lives or self._local is None):
            return predecessor.start(config)
        assert self._local is not None, "ranks come by themselves"
        return self._local.start(config, predecessor)

    def device_of(self, index: int) -> str | None:
        return None

    def stand_in(self, device: str) -> str | None:
        if self._local is None:
            return None
        if not device.startswith("cuda"):
            return device
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return f"cuda:{int(device.partition(':')[2] or 0) % gpus}" if gpus else None

    def stands_in(self, member: Member) -> bool:
        return not isinstance(member, RemoteWorker)
