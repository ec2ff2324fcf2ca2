"""Check what would keep a cluster from forming on this machine, and say what to do about it (``rpcpipe doctor``)."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psutil
import torch

from rpcpipe import _tables
from rpcpipe.cluster import authentication
from rpcpipe.cluster.authentication import read_secret
from rpcpipe.cluster.environment import RankEnvironment
from rpcpipe.cluster.launch import launch
from rpcpipe.cluster.network import addresses, choose_interface, interfaces
from rpcpipe.cluster.process import leftovers
from rpcpipe.errors import RendezvousError, RpcPipeError

_SHM_LEAST = 64 << 20
_MARKS = {True: "ok", False: "BAD", None: "-"}


@dataclass(frozen=True)
class Finding:
    """The result of one check. ``ok`` is None for what is only reported."""

    check: str
    ok: bool | None
    detail: str


def examine() -> Iterator[Finding]:
    """Run all checks, cheap ones first, and yield their findings; the last one launches a worker."""
    for check in (_versions, _cpu, _loopback, _interfaces, _name, _cuda, _shared_memory, _leftovers, _job, _launch):
        result = check()
        yield from [result] if isinstance(result, Finding) else result


def report(say: Callable[[str], None] = print) -> int:
    """Print all findings; return the exit status: 1 if anything is bad."""
    findings = list(examine())
    rows = [(finding.check, _MARKS[finding.ok], finding.detail) for finding in findings]
    say(_tables.text(("check", "", ""), rows))
    return int(any(finding.ok is False for finding in findings))


def _versions() -> Finding:
    versions = authentication.versions()
    known = ", ".join(f"{name} {version}" for name, version in versions.items())
    ok = platform.system() == "Linux" and torch.distributed.is_available()
    return Finding("versions", ok, f"{known}; {platform.system()} {platform.release()}; the same on all hosts, please")


def _cpu() -> Finding:
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0))
    return Finding("machine", None, f"{cores} cores, {_tables.mebibytes(memory.available)} of memory free")


def _loopback() -> Finding:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 1):
            return Finding("loopback", True, "connects to itself")
    except OSError as error:
        return Finding("loopback", False, f"{error}: rp.launch needs the interface lo to be up (ip link set lo up)")


def _interfaces() -> Finding:
    known = ", ".join(f"{interface.name} {interface.address}" for interface in interfaces())
    return Finding("interfaces", None, known or "none")


def _name() -> Finding:
    name = socket.gethostname()
    try:
        start = time.monotonic()
        address, seconds = ", ".join(addresses(name)), time.monotonic() - start
    except RendezvousError:
        return Finding("host name", None, f"{name} has no address here; use addresses for MASTER_ADDR")
    slow = " (slowly: this delays every connection)" if seconds > 1 else ""
    return Finding("host name", seconds <= 1, f"{name} is {address}{slow}")


def _cuda() -> Finding:
    if not torch.cuda.is_available():
        return Finding("CUDA", None, "none; workers use the CPU")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Finding("CUDA", None, f"{len(names)} devices: {', '.join(names)}")


def _shared_memory() -> Finding:
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError as error:
        return Finding("shared memory", None, f"{error}; rpcpipe does not need it, DataLoader workers do")
    few = " — too few for DataLoader workers (docker: --shm-size=1g)" if free < _SHM_LEAST else ""
    return Finding("shared memory", not few, f"{_tables.mebibytes(free)} free in /dev/shm{few}")


def _leftovers() -> Finding:
    pids = [process.pid for process in leftovers()]
    if not pids:
        return Finding("leftover workers", True, "none")
    return Finding("leftover workers", False, f"their driver is gone: kill {' '.join(map(str, pids))}")


def _job() -> Iterator[Finding]:
    """Check the variables of rp.connect, where any is set."""
    if not {"RANK", "SLURM_PROCID", "MASTER_ADDR"} & os.environ.keys():
        yield Finding(
            "multi-host", None, "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not set; rp.launch needs none"
        )
        return
    try:
        env = RankEnvironment.read(os.environ)
        interface = choose_interface(os.environ.get("RPCPIPE_BIND"), env.address)
        read_secret(os.environ)
    except RendezvousError as error:
        yield Finding("multi-host", False, str(error))
        return
    yield Finding("multi-host", True, f"rank {env.rank} of {env.world_size} on {interface.name} {interface.address}")
    yield _port(env, interface.address)


def _port(env: RankEnvironment, address: str) -> Finding:
    where = f"{env.address}:{env.port}"
    try:
        if env.rank == 0 and not env.torchrun_store:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            socket.create_server((address, env.port), family=family).close()
            return Finding("join port", True, f"{where} is free for the driver")
        socket.create_connection((env.address, env.port), 2).close()
        return Finding("join port", True, f"{where} answers")
    except (OSError, RendezvousError) as error:
        return Finding("join port", False, f"{where}: {error}")


def _launch() -> Iterator[Finding]:
    start = time.monotonic()
    try:
        with launch(workers=1, device="cpu", threads=1, timeout=30.0) as cluster:
            cluster.call(1, os.getpid)
            seconds = time.monotonic() - start
            gate = cluster.transport.gate
            yield _reachable(gate.address, gate.port)
    except RpcPipeError as error:
        yield Finding("a worker", False, str(error))
    else:
        yield Finding("a worker", True, f"launched and called in {seconds:.1f} s, and closed")


def _reachable(address: str, port: int) -> Finding:
    """Say whether the RPC port of a job that runs takes connections, which any user could make then."""
    try:
        socket.create_connection((address, port), 0.2).close()
    except OSError:
        return Finding("RPC ports", True, "take no connections while a job runs")
    return Finding(
        "RPC ports", False, "every user of this host can connect to a job's: its kernel takes no socket filter"
    )
