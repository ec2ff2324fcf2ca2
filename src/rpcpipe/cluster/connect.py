"""Workers on several hosts: ``rp.connect``."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from rpcpipe.cluster import host_agent
from rpcpipe.cluster.authentication import version_complaint
from rpcpipe.cluster.cluster import Cluster, Worker
from rpcpipe.cluster.environment import Place, secret
from rpcpipe.cluster.group import Group, name_of, names_of
from rpcpipe.cluster.host_agent import RemoteWorker
from rpcpipe.cluster.join_listener import Door
from rpcpipe.cluster.launch import adopt, live
from rpcpipe.cluster.monitor import Watch
from rpcpipe.cluster.rendezvous import form
from rpcpipe.cluster.worker_logs import Logs
from rpcpipe.errors import RendezvousError


def connect(
    *, timeout: float = 300.0, bind: str | None = None, log_dir: str | os.PathLike[str] | None = None
) -> Cluster:
    """Join the processes of one job on several hosts, by environment variables.

    RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say who is who (torchrun and Slurm set them);
    RPCPIPE_SECRET (or RPCPIPE_SECRET_FILE) must be the same everywhere; ``bind`` (or RPCPIPE_BIND) is
    the interface, address or CIDR to listen on, not needed where MASTER_ADDR is loopback.

    Rank 0 gets the Cluster of WORLD_SIZE - 1 workers. Every other rank serves inside this call and
    exits, with status 0 when the driver closes. ``timeout``: seconds until all must have come,
    and later those without any progress after which a wait raises DeadlineExceeded.
    ``log_dir`` gets, on the driver's host, a file per worker with what it prints. Raises
    RendezvousError, on all ranks, when they cannot come together.
    """
    place = Place.of(os.environ)
    if place.rank > 0:
        host_agent.serve(place, timeout=timeout, bind=bind)
    directory = None if log_dir is None else Path(log_dir).absolute()
    shape = ("connect", place, bind, directory)
    return live(shape) or adopt(_gather(place, timeout, bind, directory), shape)


def _gather(place: Place, timeout: float, bind: str | None, directory: Path | None) -> Cluster:
    key = secret(os.environ)
    interface = host_agent.listen_interface(place, bind)
    group = Group(Watch(), Logs(directory), timeout, names_of(place.world_size - 1))
    try:
        port = 0 if place.agent_store else place.port
        group.door = Door(group.watch, key, interface.address, port)
        until = time.monotonic() + timeout
        if place.agent_store:
            # torchrun's store holds MASTER_PORT itself; it tells the others where this driver listens.
            store = host_agent.agent_store(place, until)
            store.set(host_agent.store_key(place), f"{interface.address} {group.door.port}")
        members = _admit_all(group, place, until)
        devices = {name: _device(member, members) for name, member in members.items()}
        for member in members.values():
            member.send("config", group.config(member.name, devices[member.name]))
    except BaseException as error:
        group.abandon(f"{error}")
        raise
    form(group, interface.name)
    workers = [Worker(m.name, m.rank, m.host, m.pid, devices[m.name]) for m in members.values()]
    return Cluster(group, workers)


def _admit_all(group: Group, place: Place, until: float) -> dict[str, RemoteWorker]:
    """Wait for every rank; raises RendezvousError at once for what cannot become a group."""
    found: dict[int, RemoteWorker] = {}
    while len(found) < place.world_size - 1:
        if (left := until - time.monotonic()) <= 0:
            missing = [rank for rank in range(1, place.world_size) if rank not in found]
            raise RendezvousError(
                f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))} of {place.world_size} did not join in"
                " time. Are they running, with the same MASTER_ADDR, MASTER_PORT and RPCPIPE_SECRET?"
            )
        for source, kind, payload in group.watch.poll(left):
            if kind == "hello":
                member = _admit(place, found, *payload)
                found[member.rank] = group.members[member.name] = member
                group.watch.add(member)
            elif kind == "died":
                raise RendezvousError(f"rank {source.rank} ({source.host}:{source.pid}) {payload} before all had come")
        group.rest()
    group.members = {name_of(rank): found[rank] for rank in sorted(found)}
    return {name_of(rank): found[rank] for rank in sorted(found)}


def _admit(place: Place, found: dict[int, RemoteWorker], hello: dict[str, Any], channel: Any) -> RemoteWorker:
    rank, where = hello["rank"], f"{hello['host']}:{hello['pid']}"
    complaint = version_complaint(hello["versions"], where)
    if complaint is None and hello["world_size"] != place.world_size:
        complaint = f"{where} has WORLD_SIZE={hello['world_size']}, the driver {place.world_size}"
    if complaint is None and not 0 < rank < place.world_size:
        complaint = f"{where} has RANK={rank}, but ranks are 1 to {place.world_size - 1} beside the driver's 0"
    if complaint is None and rank in found:
        other = f"{found[rank].host}:{found[rank].pid}"
        complaint = f"RANK={rank} was given twice: to {other} and to {where}"
    if complaint is not None:
        channel.send("abort", complaint)
        channel.close()
        raise RendezvousError(complaint)
    return RemoteWorker(name_of(rank), hello, channel)


def _device(member: RemoteWorker, members: dict[str, RemoteWorker]) -> str:
    """The worker's GPU: the n-th worker of its host takes the n-th; "cpu" where there is none."""
    if not member.gpus:
        return "cpu"
    before = sum(one.host == member.host and one.rank < member.rank for one in members.values())
    return f"cuda:{before % member.gpus}"
