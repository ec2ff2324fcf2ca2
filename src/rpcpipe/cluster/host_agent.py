"""A rank of a multi-host group that is not the driver: starts one worker and relays for it.

The worker is a process of its own, as on the driver's host, so that its death is named with its
signal, its output arrives whole, and it ends with the driver even if it is stopped or holds its GIL.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from rpcpipe.cluster import authentication
from rpcpipe.cluster.authentication import Refused
from rpcpipe.cluster.control_channel import Channel, Message, guard
from rpcpipe.cluster.environment import Interface, Place, choose_interface, resolve, secret
from rpcpipe.cluster.join_listener import knock
from rpcpipe.cluster.monitor import Watch, heartbeat_seconds
from rpcpipe.cluster.process import Reader, WorkerProcess, environment
from rpcpipe.cluster.template import templates
from rpcpipe.errors import RendezvousError

_PAUSE = 0.1
_STOP_SECONDS = 1.5


def serve_rank() -> NoReturn:
    """``python -m rpcpipe.worker``: serve as the environment says; the exit status says how it went."""
    try:
        place = Place.of(os.environ)
        if place.rank == 0:
            raise RendezvousError("RANK=0 is the driver: run your script there, which calls rp.connect()")
        serve(place, timeout=300.0)
    except RendezvousError as error:
        print(f"rpcpipe: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


def serve(place: Place, *, timeout: float, bind: str | None = None) -> NoReturn:
    """Join the driver, run a worker until it closes; exits 0 then, 1 if the driver or the worker died."""
    key = secret(os.environ)
    interface = choose_interface(bind or os.environ.get("RPCPIPE_BIND"), place.address)
    until = time.monotonic() + timeout
    channel = _join(place, key, until)
    templates.prepare(environment(_threads(place)))  # it starts while the other ranks join
    config = _expect_config(channel, until)
    child = WorkerProcess(
        {**config, "path": sys.path, "argv": sys.argv, "interface": interface.name, "threads": _threads(place)}
    )
    channel.send("spawned", child.pid)
    try:
        status = _relay(child, channel)
    finally:
        child.kill()
        child.close()
        channel.close()
        templates.close()
    sys.exit(status)


def _join(place: Place, key: bytes, until: float) -> Channel:
    """Knock until the driver opens: it may start later than this rank."""
    hello = {
        "rank": place.rank,
        "world_size": place.world_size,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "versions": authentication.versions(),
    }
    last: object = "nothing listens"
    while time.monotonic() < until:
        address, port = find_driver(place, until)
        try:
            connection = socket.create_connection((address, port), timeout=min(5.0, max(0.1, until - time.monotonic())))
        except OSError as error:
            last = error
            time.sleep(_PAUSE)
            continue
        guard(connection, heartbeat_seconds())
        try:
            return knock(connection, key, hello)
        except Refused as error:
            connection.close()
            raise RendezvousError(f"the driver at {address}:{port} refused rank {place.rank}: {error}") from None
        except (EOFError, ValueError) as error:
            connection.close()
            last = f"{type(error).__name__} {error}: no rpcpipe driver, or it is just ending"
            time.sleep(_PAUSE)
    raise RendezvousError(
        f"rank {place.rank} found no driver at {place.address}:{place.port} in time ({last}). Is rank 0 running, are"
        " MASTER_ADDR and MASTER_PORT its, and is the port open?"
    )


def find_driver(place: Place, until: float) -> tuple[str, int]:
    """Where the driver listens: at MASTER_PORT, or where torchrun's store, which holds that port, says."""
    if not place.agent_store:
        return resolve(place.address), place.port
    try:
        address, port = agent_store(place, until).get(store_key(place)).decode().rsplit(" ", 1)
    except RuntimeError as error:
        raise RendezvousError(
            f"rank 0 did not say in torchrun's store ({place.address}:{place.port}) where it listens: {error}"
        ) from error
    return address, int(port)


def agent_store(place: Place, until: float) -> Any:
    """torchrun's store, as a client."""
    left = timedelta(seconds=max(1.0, until - time.monotonic()))
    return TCPStore(place.address, place.port, is_master=False, timeout=left, wait_for_workers=False)


def store_key(place: Place) -> str:
    """Where in torchrun's store the driver says where it listens; every restart has its own."""
    return f"rpcpipe/{place.run}"


def _expect_config(channel: Channel, until: float) -> dict[str, Any]:
    """The driver's configuration, once all ranks have joined it."""
    try:
        kind, payload = channel.next(until)
    except (EOFError, ValueError):
        raise RendezvousError(
            "the driver is gone, or does not answer, before the group was complete; its output says why"
        ) from None
    if kind != "config":
        raise RendezvousError(f"the driver gave up: {payload}")
    found: dict[str, Any] = payload
    return found


def _threads(place: Place) -> int:
    """torch's threads: OMP_NUM_THREADS (torchrun sets it), or this rank's share of the cores."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) else max(1, (os.cpu_count() or 1) // place.local_size)


class _Driver:
    """The driver's end of the channel as something to watch."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def sources(self) -> Mapping[int, Reader]:
        return {self._channel.fileno(): self._read}

    def _read(self) -> list[Message] | None:
        try:
            return self._channel.receive()
        except (EOFError, ValueError) as error:
            return [("gone", str(error))]


def _relay(child: WorkerProcess, channel: Channel) -> int:
    """Carry words between the driver and the worker until one of them ends; the exit status."""
    watch = Watch(float("inf"))
    watch.add(child)
    watch.add(_Driver(channel))
    events = [(None, kind, payload) for kind, payload in channel.flush()]
    stop: float | None = None
    while True:
        for source, kind, payload in events:
            if source is child:
                channel.send(kind, payload)
                if kind == "died":
                    return 1 if stop is None else 0
            elif kind == "gone":
                logging.getLogger("rpcpipe").error("the driver is gone (%s); its worker ends too", payload or "closed")
                return 1 if stop is None else 0
            elif kind == "kill":
                child.kill()
            else:
                stop = time.monotonic() + _STOP_SECONDS if kind == "stop" else stop
                child.send(kind, payload)
        if stop is not None and time.monotonic() > stop:
            child.kill()
        events = watch.poll()


class RemoteWorker:
    """The driver's view of a rank: the same words as a WorkerProcess, over its agent's connection."""

    def __init__(self, name: str, hello: Mapping[str, Any], channel: Channel) -> None:
        self.name = name
        self.rank: int = hello["rank"]
        self.host: str = hello["host"]
        self.pid: int = hello["pid"]
        self.gpus: int = hello["gpus"]
        self.channel = channel

    def send(self, kind: str, payload: Any = None) -> None:
        self.channel.send(kind, payload)

    def sources(self) -> Mapping[int, Reader]:
        return {self.channel.fileno(): self._read}

    def _read(self) -> list[Message] | None:
        try:
            messages = self.channel.receive()
        except (EOFError, ValueError) as error:
            return [("died", f"closed its connection ({error or 'its rpcpipe.worker process or its host ended'})")]
        for kind, payload in messages:
            if kind == "spawned":
                self.pid = payload
        return messages

    def state(self) -> str:
        return "the host or the network may be down, or the worker is stopped or holds its GIL"

    def stopped(self) -> bool:
        return False  # cannot be told from here

    def kill(self) -> None:
        self.channel.send("kill")

    def close(self) -> None:
        self.channel.close()


def listen_interface(place: Place, bind: str | None) -> Interface:
    """The driver's interface, which must have MASTER_ADDR; raises RendezvousError."""
    found = choose_interface(bind or os.environ.get("RPCPIPE_BIND"), place.address)
    master = resolve(place.address)
    if master != found.address and not place.agent_store:
        raise RendezvousError(
            f"MASTER_ADDR={place.address} ({master}) is not the address {found.address} of {found.name}, where the"
            " driver listens: set MASTER_ADDR, or RPCPIPE_BIND, so that both name the same"
        )
    return found
