"""Join workers of several hosts (``rp.connect``)."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rpcpipe._arguments import require_kind, require_path, require_seconds
from rpcpipe.cluster import host_agent
from rpcpipe.cluster.authentication import read_secret, version_complaint
from rpcpipe.cluster.cluster import Cluster
from rpcpipe.cluster.environment import RankEnvironment, publish_driver
from rpcpipe.cluster.join_listener import JoinListener
from rpcpipe.cluster.launch import heal_tries, live
from rpcpipe.cluster.monitor import Monitor
from rpcpipe.cluster.network import Interface, addresses, choose_interface
from rpcpipe.cluster.remote_worker import RemoteWorker
from rpcpipe.cluster.rendezvous import Member, Starter, Worker, WorkerGroup, form, worker_name, worker_names
from rpcpipe.cluster.worker_logs import WorkerLogs
from rpcpipe.errors import RendezvousError


def connect(
    *,
    timeout: float = 300.0,
    bind: str | None = None,
    log_dir: str | os.PathLike[str] | None = None,
    heal: bool | int = True,
) -> Cluster:
    """Join the processes of one job on several hosts, by environment variables.

    RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say who is who (torchrun and Slurm set them);
    RPCPIPE_SECRET (or RPCPIPE_SECRET_FILE) must be the same everywhere; ``bind`` (or RPCPIPE_BIND) is
    the interface, address or CIDR to listen on, not needed where MASTER_ADDR is loopback.

    On rank 0 return the Cluster of WORLD_SIZE - 1 workers. Every other rank serves inside this call and
    exits, with status 0 when the driver closes. ``timeout``: seconds until all must have come,
    and later those without any progress after which a wait raises DeadlineExceeded.
    ``heal``: how often a call in which workers have died is made again, once their hosts have started others; True is
    3, False 0. ``log_dir`` gets, on the driver's host, a file per worker with what it prints. Raises
    RendezvousError, on all ranks, when they cannot come together.
    """
    timeout = require_seconds("timeout", timeout)
    require_kind("bind", bind, (str, type(None)), "an interface, an address or a CIDR, as a string, or None")
    directory = None if log_dir is None else require_path("log_dir", log_dir).absolute()
    tries = heal_tries(heal)
    env = RankEnvironment.read(os.environ)
    if env.rank > 0:
        host_agent.serve(env, timeout=timeout, bind=bind)
    shape = ("connect", env, bind, directory, tries)
    return live.reuse(shape) or live.keep(_gather(env, timeout, bind, directory, tries), shape)


def _gather(env: RankEnvironment, timeout: float, bind: str | None, directory: Path | None, heal: int) -> Cluster:
    secret = read_secret(os.environ)
    interface = _listen_interface(env, bind)
    group = WorkerGroup(Monitor(), WorkerLogs(directory), timeout, worker_names(env.world_size - 1))
    try:
        port = 0 if env.torchrun_store else env.port  # torchrun's store listens at the latter itself
        group.listener = JoinListener(group.monitor, secret, interface.address, port)
        deadline = time.monotonic() + timeout
        if env.torchrun_store:
            publish_driver(env, interface.address, group.listener.port, deadline)
        members = _admit_all(group, env, deadline)
        devices = {name: _device(member, members) for name, member in members.items()}
        for member in members.values():
            member.send("config", group.worker_config(member.name, devices[member.name]))
    except BaseException as error:
        group.abandon(f"{error}")
        raise
    group.starter = Starter(_start_again)
    form(group, interface.name)
    workers = [Worker(name, one.rank, one.host, one.pid, devices[name]) for name, one in members.items()]
    return Cluster(group, workers, heal=heal)


def _listen_interface(env: RankEnvironment, bind: str | None) -> Interface:
    """Return the driver's interface; raises RendezvousError if MASTER_ADDR is not on it."""
    interface = choose_interface(bind or os.environ.get("RPCPIPE_BIND"), env.address)
    masters = addresses(env.address)
    if interface.address not in masters and not env.torchrun_store:
        raise RendezvousError(
            f"MASTER_ADDR={env.address} ({', '.join(masters)}) is not the address {interface.address} of"
            f" {interface.name}, where the driver listens: set MASTER_ADDR, or RPCPIPE_BIND, so that both name the same"
        )
    return interface


def _admit_all(group: WorkerGroup, env: RankEnvironment, deadline: float) -> dict[str, RemoteWorker]:
    """Wait for every rank; return the workers by name. Raises RendezvousError at once for what is no group."""
    by_rank: dict[int, RemoteWorker] = {}
    while len(by_rank) < env.world_size - 1:
        if (left := deadline - time.monotonic()) <= 0:
            missing = [rank for rank in range(1, env.world_size) if rank not in by_rank]
            raise RendezvousError(
                f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))} of {env.world_size} did not join in"
                " time. Are they running, with the same MASTER_ADDR, MASTER_PORT and RPCPIPE_SECRET?"
            )
        for source, kind, payload in group.monitor.poll(left):
            if kind == "hello":
                member = _admit(env, by_rank, *payload)
                by_rank[member.rank] = group.members[member.name] = member
                group.monitor.add(member)
            elif kind == "died":
                raise RendezvousError(f"rank {source.rank} ({source.host}:{source.pid}) {payload} before all had come")
        group.housekeeping()
    members = {worker_name(rank): by_rank[rank] for rank in sorted(by_rank)}
    group.members = dict(members)
    return members


def _admit(env: RankEnvironment, by_rank: dict[int, RemoteWorker], hello: dict[str, Any], channel: Any) -> RemoteWorker:
    """Return the worker that says ``hello``; raises RendezvousError, and tells the worker, if it does not fit."""
    rank, where = hello["rank"], f"{hello['host']}:{hello['pid']}"
    complaint = version_complaint(hello["versions"], where)
    if complaint is None and hello["world_size"] != env.world_size:
        complaint = f"{where} has WORLD_SIZE={hello['world_size']}, the driver {env.world_size}"
    if complaint is None and not 0 < rank < env.world_size:
        complaint = f"{where} has RANK={rank}, but ranks are 1 to {env.world_size - 1} beside the driver's 0"
    if complaint is None and rank in by_rank:
        other = f"{by_rank[rank].host}:{by_rank[rank].pid}"
        complaint = f"RANK={rank} was given twice: to {other} and to {where}"
    if complaint is not None:
        channel.send("abort", complaint)
        channel.close()
        raise RendezvousError(complaint)
    return RemoteWorker(worker_name(rank), hello, channel)


def _start_again(config: Mapping[str, Any], ended: Member | None) -> RemoteWorker:
    assert isinstance(ended, RemoteWorker), "ranks are not added"
    return ended.start_again(config)


def _device(member: RemoteWorker, members: dict[str, RemoteWorker]) -> str:
    """Return the worker's GPU, the n-th one for the n-th worker of a host; "cpu" where there is none."""
    if not member.gpus:
        return "cpu"
    before = sum(one.host == member.host and one.rank < member.rank for one in members.values())
    return f"cuda:{before % member.gpus}"
