"""Serve as a rank of a multi-host group that is not the driver: start a worker and relay for it.

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
from typing import Any, NoReturn

import torch

from rpcpipe.cluster import authentication
from rpcpipe.cluster.authentication import AuthenticationError, authenticate, read_secret
from rpcpipe.cluster.control_channel import Channel, Message
from rpcpipe.cluster.environment import RankEnvironment, find_driver, thread_count
from rpcpipe.cluster.kept_descriptor import KeptDescriptor
from rpcpipe.cluster.monitor import Monitor, heartbeat_seconds
from rpcpipe.cluster.network import choose_interface, enable_keepalive
from rpcpipe.cluster.process import Reader, WorkerProcess, strings, worker_environment
from rpcpipe.cluster.template import templates
from rpcpipe.errors import RendezvousError

_PAUSE = 0.1
_CONNECT_SECONDS = 5.0
_STOP_SECONDS = 1.5

log = logging.getLogger("rpcpipe")


def serve_rank() -> NoReturn:
    """Serve the rank that the environment names (``python -m rpcpipe.worker``); exit as ``serve`` does.

    Prints a RendezvousError and exits with status 1.
    """
    try:
        env = RankEnvironment.read(os.environ)
        if env.rank == 0:
            raise RendezvousError("RANK=0 is the driver: run your script there, which calls rp.connect()")
        serve(env, timeout=300.0)
    except RendezvousError as error:
        print(f"rpcpipe: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


def serve(env: RankEnvironment, *, timeout: float, bind: str | None = None) -> NoReturn:
    """Join the driver and run a worker until the driver closes; another one if it asks for it when the first has died.

    Exits with status 0 then, with 1 if the driver died, or the worker and had no successor. Raises RendezvousError if
    the group does not form within ``timeout`` seconds. ``bind`` is ``rp.connect``'s.
    """
    secret = read_secret(os.environ)
    interface = choose_interface(bind or os.environ.get("RPCPIPE_BIND"), env.address)
    deadline = time.monotonic() + timeout
    channel = _join(env, secret, deadline)
    threads = thread_count(os.environ, env.local_size)
    templates.prepare(worker_environment(threads))  # it starts while the other ranks join
    config = _expect_config(channel, deadline)
    local = {"path": strings(sys.path), "argv": strings(sys.argv), "interface": interface.name, "threads": threads}
    relay = _Relay(channel, local)
    try:
        relay.start(config)
        status = relay.run()
    finally:
        relay.close()
        channel.close()
        templates.close()
    sys.exit(status)


def _join(env: RankEnvironment, secret: bytes, deadline: float) -> Channel:
    """Connect to the driver, again and again because it may start later than this rank."""
    hello = {
        "rank": env.rank,
        "world_size": env.world_size,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "versions": authentication.versions(),
    }
    last: object = "nothing listens"
    while time.monotonic() < deadline:
        address, port = find_driver(env, deadline)
        patience = min(_CONNECT_SECONDS, max(0.1, deadline - time.monotonic()))
        try:
            connection = socket.create_connection((address, port), timeout=patience)
        except OSError as error:
            last = error
            time.sleep(_PAUSE)
            continue
        enable_keepalive(connection, heartbeat_seconds())
        try:
            return authenticate(connection, secret, hello)
        except AuthenticationError as error:
            connection.close()
            raise RendezvousError(f"the driver at {address}:{port} refused rank {env.rank}: {error}") from None
        except (EOFError, ValueError) as error:
            connection.close()
            last = f"{type(error).__name__} {error}: no rpcpipe driver, or it is just ending"
            time.sleep(_PAUSE)
    raise RendezvousError(
        f"rank {env.rank} found no driver at {env.address}:{env.port} in time ({last}). Is rank 0 running, are"
        " MASTER_ADDR and MASTER_PORT its, and is the port open?"
    )


def _expect_config(channel: Channel, deadline: float) -> dict[str, Any]:
    """Return the worker's configuration, which the driver sends once all ranks have joined.

    It lets a rank that comes later wait, however long, and exits if it is not needed until the driver closes.
    """
    try:
        kind, payload = channel.next(deadline)
        if kind == "wait":
            kind, payload = channel.next(float("inf"))
    except (EOFError, ValueError):
        raise RendezvousError(
            "the driver is gone, or does not answer, before this rank has become part of its group; its output says why"
        ) from None
    if kind == "stop":
        channel.close()
        templates.close()
        sys.exit(0)
    if kind != "config":
        raise RendezvousError(f"the driver gave up: {payload}")
    config: dict[str, Any] = payload
    return config


class _DriverConnection:
    """The driver's end of the channel, as a source for a monitor."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def readers(self) -> Mapping[int, Reader]:
        return {self._channel.fileno(): self._read}

    def _read(self) -> list[Message] | None:
        try:
            return self._channel.receive()
        except (EOFError, ValueError) as error:
            return [("gone", str(error))]


class _Relay:
    """Starts workers, one after the other, and passes messages between the driver and the one that lives."""

    def __init__(self, channel: Channel, local: Mapping[str, Any]) -> None:
        self._channel = channel
        self._local = local  # what every worker here is told
        self._worker: WorkerProcess | None = None  # None once it has ended
        self._monitor = Monitor(float("inf"))
        self._monitor.add(_DriverConnection(channel))
        self._stop: float | None = None
        self._kept: dict[int, KeptDescriptor] = {}  # what workers of here have in memory that must outlive them

    def start(self, config: Mapping[str, Any]) -> None:
        """Start a worker and tell the driver."""
        self._worker = WorkerProcess({**config, **self._local})
        self._monitor.add(self._worker)
        self._channel.send("spawned", self._worker.pid)

    def run(self) -> int:
        """Relay until the driver closes or dies, or the worker has ended as told; return the exit status."""
        events = [(None, kind, payload) for kind, payload in self._channel.take_buffered()]
        while True:
            for source, kind, payload in events:
                from_worker = isinstance(source, WorkerProcess)
                ended = (self._from_worker if from_worker else self._from_driver)(kind, payload)
                if ended is not None:
                    return ended
            if self._stop is not None and self._worker is not None and time.monotonic() > self._stop:
                self._worker.kill()
            events = self._monitor.poll()

    def _from_worker(self, kind: str, payload: Any) -> int | None:
        self._channel.send(kind, payload)
        if kind != "died":
            return None
        if self._stop is not None:
            return 0
        self._end_worker()  # the driver may want another one
        return None

    def _from_driver(self, kind: str, payload: Any) -> int | None:
        if kind in ("gone", "stop") and self._worker is None:
            return 1 if kind == "gone" else 0
        if kind == "gone":
            log.error("the driver is gone (%s); its worker ends too", payload or "closed")
            return 1 if self._stop is None else 0
        if kind == "config" and self._worker is None:
            self.start(payload)
        elif kind == "keep":
            self._keep(*payload)
        elif kind == "let go":
            self._kept.pop(payload).close()
        elif self._worker is None:
            pass  # it was for the one that has ended
        elif kind == "kill":
            self._worker.kill()
        else:
            self._stop = time.monotonic() + _STOP_SECONDS if kind == "stop" else self._stop
            self._worker.send(kind, payload)
        return None

    def _keep(self, number: int, pid: int, descriptor: int) -> None:
        """Keep what the worker ``pid`` has in memory, under ``number``; tell the driver its path, '' if it has none."""
        try:
            self._kept[number] = kept = KeptDescriptor(pid, descriptor)
        except OSError:
            self._channel.send("kept", [number, ""])
        else:
            self._channel.send("kept", [number, kept.path])

    def _end_worker(self) -> None:
        """End the worker, if it lives, and release what belongs to it."""
        if (worker := self._worker) is not None:
            self._worker = None
            self._monitor.remove(worker)
            worker.kill()
            worker.close()

    def close(self) -> None:
        """End the worker, and stop relaying."""
        self._end_worker()
        self._monitor.close()
