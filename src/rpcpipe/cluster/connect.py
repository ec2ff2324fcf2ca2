"""Join workers of several hosts (``rp.connect``)."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rpcpipe._arguments import require_kind, require_path, require_seconds
from rpcpipe.cluster import host_agent
from rpcpipe.cluster.authentication import read_secret, version_complaint
from rpcpipe.cluster.cluster import Cluster
from rpcpipe.cluster.environment import RankEnvironment, publish_driver, thread_count
from rpcpipe.cluster.join_listener import JoinListener
from rpcpipe.cluster.launch import SHRINK, heal_tries, live, refuse_on_worker, require_descriptors
from rpcpipe.cluster.monitor import Monitor
from rpcpipe.cluster.network import Interface, addresses, choose_interface
from rpcpipe.cluster.process import worker_environment
from rpcpipe.cluster.remote_worker import RemoteWorker
from rpcpipe.cluster.rendezvous import Worker, WorkerGroup, form, worker_name, worker_names
from rpcpipe.cluster.starters import LocalStarter, RankStarter
from rpcpipe.cluster.template import templates
from rpcpipe.cluster.worker_logs import WorkerLogs
from rpcpipe.errors import ArgumentError, RendezvousError


def connect(
    *,
    timeout: float = 300.0,
    bind: str | None = None,
    log_dir: str | os.PathLike[str] | None = None,
    spares: int | None = None,
    heal: bool | int | Literal["shrink"] = True,
) -> Cluster:
    """Join the processes of one job on several hosts, by environment variables.

    RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say who is who (torchrun and Slurm set them);
    RPCPIPE_SECRET (or RPCPIPE_SECRET_FILE) must be the same everywhere; ``bind`` (or RPCPIPE_BIND) is
    the interface, address or CIDR to listen on, not needed where MASTER_ADDR is loopback.

    On rank 0 return the Cluster of WORLD_SIZE - 1 workers; the last ``spares`` ranks (default: RPCPIPE_SPARES, or 0)
    stay idle instead (``cluster.spares``), until one takes the place of a worker whose host has died. A rank that
    comes later, with a RANK that nobody has, becomes a spare. Every other rank serves inside this call and
    exits, with status 0 when the driver closes. ``timeout``: seconds until all must have come,
    and later those without any progress after which a wait raises DeadlineExceeded.
    ``heal``: how often a call in which workers have died is made again, once their hosts have started others, or spares
    have taken their places; True is 3, False 0; "shrink": 3, and where a host has died and no spare is left, a process
    of the driver's host stands in (``cluster.stand_ins``). ``log_dir`` gets, on the driver's host, a file per worker
    with what it prints. Raises ArgumentError for more spares than there are ranks, and RendezvousError, on all ranks,
    when they cannot come together.
    """
    refuse_on_worker("rp.connect")
    timeout = require_seconds("timeout", timeout)
    require_kind("bind", bind, (str, type(None)), "an interface, an address or a CIDR, as a string, or None")
    directory = None if log_dir is None else require_path("log_dir", log_dir).absolute()
    tries = heal_tries(heal)
    env = RankEnvironment.read(os.environ)
    if env.rank > 0:
        host_agent.serve(env, timeout=timeout, bind=bind)
    names = _names(env, spares)
    shape = ("connect", env, bind, directory, heal, names)
    if (cluster := live.reuse(shape)) is not None:
        return cluster
    require_descriptors(len(names))
    interface = _listen_interface(env, bind)
    starter = RankStarter(_local_starter(env, interface) if heal == SHRINK else None)
    group = WorkerGroup(Monitor(), WorkerLogs(directory), timeout, names, starter)
    return live.keep(_gather(env, group, interface, tries), shape)


def _names(env: RankEnvironment, spares: int | None) -> list[str]:
    """Return the names of all ranks but the driver's, the spares' last; raises ArgumentError for too many spares."""
    given = os.environ.get("RPCPIPE_SPARES", "0") if spares is None else spares
    source = "RPCPIPE_SPARES" if spares is None else "spares"
    count = int(given) if isinstance(given, str) and given.isdigit() else given
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= env.world_size - 2:
        raise ArgumentError(
            f"{source}={given!r}: of WORLD_SIZE={env.world_size} ranks one is the driver and one at least a worker, so"
            f" 0 to {env.world_size - 2} can be spares; start more ranks with a larger WORLD_SIZE"
        )
    return [*worker_names(env.world_size - 1 - count), *(f"spare{index}" for index in range(count))]


def _local_starter(env: RankEnvironment, interface: Interface) -> LocalStarter:
    """Return what starts processes that stand in, as this host's agent would if it were a rank's."""
    threads = thread_count(os.environ, env.local_size)
    templates.prepare(worker_environment(threads))
    return LocalStarter("auto", threads, interface.name)


def _gather(env: RankEnvironment, group: WorkerGroup, interface: Interface, heal: int) -> Cluster:
    try:
        secret = read_secret(os.environ)
        port = 0 if env.torchrun_store else env.port  # torchrun's store listens at the latter itself
        group.listener = JoinListener(group.monitor, secret, interface.address, port)
        deadline = time.monotonic() + group.timeout
        if env.torchrun_store:
            publish_driver(env, interface.address, group.listener.port, deadline)
        members = _admit_all(group, env, deadline)
        devices: dict[str, str] = {}
        for name, member in members.items():
            devices[name] = member.device([devices[one] for one in devices if members[one].host == member.host])
            member.start(group.worker_config(name, devices[name]))
    except BaseException as error:
        group.abandon(f"{error}")
        raise
    form(group, interface.name)
    joined = [Worker(name, one.rank, one.host, one.pid, devices[name]) for name, one in members.items()]
    workers = [worker for worker in joined if worker.name == worker_name(worker.rank)]
    return Cluster(group, workers, joined[len(workers) :], heal=heal)


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
                member = _admit(env, group.names, by_rank, *payload)
                by_rank[member.rank] = group.members[member.name] = member
                group.monitor.add(member)
            elif kind == "died":
                raise RendezvousError(f"rank {source.rank} ({source.host}:{source.pid}) {payload} before all had come")
        group.housekeeping()
    members = {by_rank[rank].name: by_rank[rank] for rank in sorted(by_rank)}
    group.members = dict(members)
    return members


def _admit(
    env: RankEnvironment,
    names: Sequence[str],
    by_rank: Mapping[int, RemoteWorker],
    hello: dict[str, Any],
    channel: Any,
) -> RemoteWorker:
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
    return RemoteWorker(names[rank - 1], hello, channel)
