"""Read from the environment which rank of which group this process is, and where its driver is.

torchrun sets RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and more; Slurm's srun sets SLURM_PROCID and
SLURM_NTASKS; by hand one sets the first four. Every error names the variables and their values.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from rpcpipe.cluster.network import addresses
from rpcpipe.errors import RendezvousError

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SLURM_PORT, _SLURM_PORTS = 29500, 10000
_MOST_RANKS = 1 << 16


@dataclass(frozen=True)
class RankEnvironment:
    """This process among all ranks.

    The driver (rank 0) is at ``address:port``. ``local_size``: ranks on this host. ``torchrun_store``:
    torchrun's own store listens at that port instead, and says where the driver does. ``run_id`` tells
    restarts of one job apart.
    """

    rank: int
    world_size: int
    address: str
    port: int
    local_size: int
    torchrun_store: bool
    run_id: str

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> RankEnvironment:
        """Read RANK and its like, else Slurm's variables; raises RendezvousError."""
        values = {name: environ[name] for name in _VARIABLES if environ.get(name)}
        if "RANK" not in values and "SLURM_PROCID" in environ:
            values = {**_slurm(environ), **values}
        missing = [name for name in _VARIABLES if name not in values]
        if missing:
            given = ", ".join(f"{name}={values[name]}" for name in _VARIABLES if name in values) or "none of the four"
            raise RendezvousError(
                f"{', '.join(missing)} not set (set: {given}). Every process of rp.connect needs"
                f" {', '.join(_VARIABLES)}; torchrun and srun set them. On one host rp.launch needs none"
            )
        rank, world_size = _number(values, "RANK", 0), _number(values, "WORLD_SIZE", 2)
        if rank >= world_size:
            raise RendezvousError(
                f"RANK={rank} contradicts WORLD_SIZE={world_size}: ranks count from 0, the driver's, to WORLD_SIZE - 1"
            )
        ranks = next((name for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE") if environ.get(name)), None)
        if world_size > _MOST_RANKS:
            raise RendezvousError(f"WORLD_SIZE={world_size} is more than {_MOST_RANKS}, and surely a slip")
        port = _number(values, "MASTER_PORT", 1)
        if port > 65535:
            raise RendezvousError(f"MASTER_PORT={port} is no port")
        return cls(
            rank,
            world_size,
            values["MASTER_ADDR"],
            port,
            1 if ranks is None else _number(environ, ranks, 1),
            environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            f"{environ.get('TORCHELASTIC_RUN_ID', '')}/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}",
        )


def _number(values: Mapping[str, str], name: str, least: int) -> int:
    try:
        value = int(values[name])
    except ValueError:
        value = least - 1
    if value < least:
        what = "the driver and at least one worker" if name == "WORLD_SIZE" else f"a whole number from {least} on"
        raise RendezvousError(f"{name}={values[name]!r} must be {what}")
    return value


def _slurm(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the four variables, as far as Slurm's say them."""
    values = {"RANK": environ["SLURM_PROCID"]}
    if "SLURM_NTASKS" in environ:
        values["WORLD_SIZE"] = environ["SLURM_NTASKS"]
    hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if hosts:
        values["MASTER_ADDR"] = first_host(hosts)
    if "SLURM_JOB_ID" in environ:
        # The same on all hosts, another for every job.
        values["MASTER_PORT"] = str(_SLURM_PORT + _number(environ, "SLURM_JOB_ID", 0) % _SLURM_PORTS)
    return values


def first_host(nodes: str) -> str:
    """Return the first host of Slurm's compressed list: ``gpu[03-06,9],login`` gives ``gpu03``."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodes)
    if match is None:
        raise RendezvousError(f"SLURM_JOB_NODELIST={nodes!r} cannot be read; set MASTER_ADDR")
    return match[1] + (match[2] or "")


def thread_count(environ: Mapping[str, str], local_size: int) -> int:
    """Return torch's threads per worker: OMP_NUM_THREADS (torchrun sets it), or this rank's share of the cores."""
    given = environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else max(1, (os.cpu_count() or 1) // local_size)


# --- torchrun's store, which holds MASTER_PORT where torchrun has one ---


def publish_driver(env: RankEnvironment, address: str, port: int, deadline: float) -> None:
    """Say in torchrun's store that the driver listens at ``address:port``; ``deadline``: monotonic seconds."""
    _torchrun_store(env, deadline).set(_store_key(env), f"{address} {port}")


def find_driver(env: RankEnvironment, deadline: float) -> tuple[str, int]:
    """Return the (host, port) at which the driver listens, at one of the host's addresses; ``deadline``: monotonic.

    Raises RendezvousError if MASTER_ADDR has no address, or nothing is in torchrun's store in time.
    """
    if not env.torchrun_store:
        addresses(env.address)  # refuses a host that has none
        return env.address, env.port
    try:
        address, port = _torchrun_store(env, deadline).get(_store_key(env)).decode().rsplit(" ", 1)
    except RuntimeError as error:
        raise RendezvousError(
            f"rank 0 did not say in torchrun's store ({env.address}:{env.port}) where it listens: {error}"
        ) from error
    return address, int(port)


def _torchrun_store(env: RankEnvironment, deadline: float) -> Any:
    left = timedelta(seconds=max(1.0, deadline - time.monotonic()))
    return TCPStore(env.address, env.port, is_master=False, timeout=left, wait_for_workers=False)


def _store_key(env: RankEnvironment) -> str:
    """Return the driver's key, another one in every restart."""
    return f"rpcpipe/{env.run_id}"
