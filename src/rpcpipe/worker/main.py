"""Run a worker process: join the group, then run tasks until the driver closes or dies.

A process that a driver or a host agent starts is either the template that workers are forked from, or a worker
that inherits a control channel. A process started by hand (or by torchrun or Slurm) is a host agent: it
serves as a rank of ``rp.connect``.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, NoReturn

import psutil
import torch

from rpcpipe.cluster.control_channel import Channel, Message
from rpcpipe.cluster.host_agent import serve_rank
from rpcpipe.cluster.monitor import BEAT_SECONDS
from rpcpipe.cluster.spawner import end_with_parent
from rpcpipe.cluster.template import CONTROL_FD, TEMPLATE_FD
from rpcpipe.transport.base import WorkerEndpoint
from rpcpipe.transport.roster import Roster, Seat
from rpcpipe.transport.rpc import RpcTransport, this_process
from rpcpipe.transport.rpc_sockets import cut
from rpcpipe.transport.rpc_store import ExchangeStore
from rpcpipe.worker import fork_server
from rpcpipe.worker.executor import Executor

log = logging.getLogger("rpcpipe.worker")


def main() -> None:
    """Run as the template, as a worker or as a host agent, as the environment says."""
    if (inherited := os.environ.pop(TEMPLATE_FD, None)) is not None:
        fork_server.serve(_inherit(inherited), work)
    if (inherited := os.environ.pop(CONTROL_FD, None)) is not None:
        work(_inherit(inherited))
    serve_rank()


def _inherit(inherited: str) -> socket.socket:
    """Return the socket inherited from the parent, and let this process end with the parent from now on.

    ``inherited``: the socket's descriptor and the parent's pid, separated by a space.
    """
    fd, parent = map(int, inherited.split())
    # The kernel ends this process with its parent even if this process is stopped or a thread holds the GIL.
    end_with_parent(parent)
    os.set_inheritable(fd, False)
    return socket.socket(fileno=fd)


def work(connection: socket.socket) -> NoReturn:
    """Serve as a worker of the process at the other end of the control socket ``connection``; then exit."""
    gc.enable()
    control = Control(Channel(connection))
    config = control.expect("config")
    _set_up(config)
    executor = _join(config, control)
    threading.Thread(target=control.beat, daemon=True, name="rpcpipe-beat").start()
    executor.serve()
    this_process.shutdown()
    exit_now(0)


class Control:
    """The worker's end of the control channel, read by a thread that ends the process when the channel ends."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._process = psutil.Process()
        self.executor: Executor | None = None
        self.transport: RpcTransport | None = None
        self._values: dict[str, queue.SimpleQueue[str]] = {}
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._lock = threading.Lock()
        threading.Thread(target=self._read, daemon=True, name="rpcpipe-control").start()

    def expect(self, kind: str, timeout: float | None = None) -> Any:
        """Return the payload of the driver's next message; exit the process unless the message is of ``kind``.

        Raises queue.Empty after ``timeout`` seconds; with None the wait ends when the driver does.
        """
        received, payload = self._messages.get(timeout=timeout)
        if received != kind:
            exit_now(1)
        return payload

    def fetch(self, key: str, timeout: float) -> str:
        """Return the value that some rank publishes under ``key``; raises queue.Empty after ``timeout`` seconds."""
        box = self._box(key)
        value = box.get(timeout=timeout)
        box.put(value)  # torch may read the key again
        return value

    def _box(self, key: str) -> queue.SimpleQueue[str]:
        with self._lock:
            return self._values.setdefault(key, queue.SimpleQueue())

    def _read(self) -> None:
        while True:
            try:
                messages = self.channel.receive()
            except (EOFError, ValueError):
                exit_now(1)  # the driver has ended
            for kind, payload in messages:
                try:
                    self._handle(kind, payload)
                except Exception:
                    # What a message changes is the same in all processes, or they could not go on together.
                    log.exception("a %r message of the driver failed", kind)
                    exit_now(1)

    def _handle(self, kind: str, payload: Any) -> None:
        if kind == "key":
            self._box(payload[0]).put(payload[1])
        elif kind == "admit":
            self._admit(*payload)
        elif kind == "meet":
            self._meet(payload)
        elif kind == "cut":
            cut(payload)
        elif kind == "gate":
            self._set_gate(payload)
        elif kind != "stop":
            self._messages.put((kind, payload))
        elif (executor := self.executor) is None:
            exit_now(0)
        else:
            executor.close()

    def _set_gate(self, open_: bool) -> None:
        """Let processes connect to this one, or none any more."""
        assert self.transport is not None
        gate = self.transport.gate
        gate.open() if open_ else gate.close()

    def _admit(self, seats: Mapping[str, Any], without: Sequence[str]) -> None:
        """Let processes stand for names, this one, too, and none for those ``without``."""
        assert self.transport is not None
        assert self.executor is not None
        admitted = {name: Seat(*seat) for name, seat in seats.items()}
        gone = self.transport.admit(admitted, without)
        for name, seat in admitted.items():
            if seat == self.transport.roster.own:
                self.executor.name = name
        with self._lock:
            for key in [key for key in self._values if key.rpartition("/")[2] in {seat.wire for seat in gone}]:
                del self._values[key]

    def _meet(self, others: Sequence[str]) -> None:
        """Call ``others``, which opens connections to them; report each that has answered, or why it has not."""
        assert self.transport is not None
        for name in others:
            reply = self.transport.call(name, "clock")
            reply.add_done_callback(partial(self._met, self.transport.roster.seats[name].wire))

    def _met(self, wire: str, reply: Future[Any]) -> None:
        error = reply.exception()
        self.channel.send("met", [wire, None if error is None else str(error)])

    def beat(self) -> None:
        """Send a heartbeat every ``BEAT_SECONDS``: the executor's progress and this process's memory in bytes."""
        pause = threading.Event()
        while True:
            pause.wait(BEAT_SECONDS)
            self.send_state()

    def send_state(self) -> None:
        """Send a heartbeat."""
        assert self.executor is not None
        self.channel.send("beat", [*self.executor.progress(), self._process.memory_info().rss])


def _set_up(config: dict[str, Any]) -> None:
    """Set the import path, arguments, logging and device of this process from the driver's ``config``."""
    sys.path[:] = config["path"]
    sys.argv = config["argv"]
    logging.basicConfig(level=config["log_level"])
    device = torch.device(config["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _join(config: dict[str, Any], control: Control) -> Executor:
    """Join the group of ``config``; return the executor that serves the group's messages."""
    name, timeout = config["name"], config["timeout"]
    seats = {other: Seat(*seat) for other, seat in config["seats"].items()}
    transport = RpcTransport(Roster(config["generation"], name, seats))
    executor = Executor(name, transport, device=torch.device(config["device"]), threads=config["threads"])
    control.executor, control.transport = executor, transport
    endpoint: WorkerEndpoint = executor
    transport.serve(name, endpoint)
    control.channel.send("ready")
    control.expect("join", timeout)
    store = ExchangeStore(
        lambda key, value: control.channel.send("set", [key, value]), lambda key: control.fetch(key, timeout)
    )
    this_process.join(store, transport.roster, interface=config["interface"])
    # torch's agent closes its listener for good if a peer ends while its first connection is being made. The driver's
    # listener must serve later groups, too; so the driver, once it has heard this, asks for a call before any work.
    control.send_state()  # before, so that a cluster that has formed knows it of every worker
    control.channel.send("joined")
    return executor


def exit_now(status: int) -> NoReturn:
    """End this process with ``status``. sys.exit would not do: interpreter shutdown may abort while RPC threads run."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # a flush raises if the reader of the output has ended
        os._exit(status)
