"""A worker process: joins the group, then runs tasks until the driver closes or dies.

Started by a driver or an agent it is the template that workers are forked from, or inherits a
control channel as a worker itself; started by hand (or by torchrun or Slurm) it is an agent: it serves as a rank
of ``rp.connect``.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import socket
import sys
import threading
from typing import Any, NoReturn

import psutil
import torch

from rpcpipe.cluster.control_channel import Channel
from rpcpipe.cluster.host_agent import serve_rank
from rpcpipe.cluster.monitor import BEAT_SECONDS
from rpcpipe.cluster.spawner import end_with_parent
from rpcpipe.cluster.template import CONTROL_FD, TEMPLATE_FD
from rpcpipe.transport import rpc
from rpcpipe.transport.rpc_store import ExchangeStore
from rpcpipe.worker import fork_server
from rpcpipe.worker.executor import Executor


def main() -> None:
    """Serve whoever started this process."""
    if (told := os.environ.pop(TEMPLATE_FD, None)) is not None:
        fork_server.serve(_inherit(told), work)
    if (told := os.environ.pop(CONTROL_FD, None)) is not None:
        work(_inherit(told))
    serve_rank()


def _inherit(told: str) -> socket.socket:
    """The socket that this process's parent has left it; both end together from now on."""
    fd, parent = map(int, told.split())
    # The kernel ends this process with its driver even if it is stopped or holds its GIL.
    end_with_parent(parent)
    os.set_inheritable(fd, False)
    return socket.socket(fileno=fd)


def work(connection: socket.socket) -> NoReturn:
    """Be a worker of whoever is at the other end of the control socket ``connection``."""
    gc.enable()
    control = Control(Channel(connection))
    _serve(control.expect("config"), control)


class Control:
    """The worker's end of the control channel, read by a thread that ends the process with it."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.executor: Executor | None = None
        self._values: dict[str, queue.SimpleQueue[str]] = {}
        self._words: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        threading.Thread(target=self._read, daemon=True, name="rpcpipe-control").start()

    def expect(self, kind: str, timeout: float | None = None) -> Any:
        """The payload of the next word of the driver, which must be ``kind``."""
        found, payload = self._words.get(timeout=timeout)
        if found != kind:
            exit_now(1)
        return payload

    def fetch(self, key: str, timeout: float) -> str:
        """The value that some rank publishes under ``key``; queue.Empty after ``timeout`` seconds."""
        box = self._box(key)
        value = box.get(timeout=timeout)
        box.put(value)  # read as often as torch likes
        return value

    def _box(self, key: str) -> queue.SimpleQueue[str]:
        with self._lock:
            return self._values.setdefault(key, queue.SimpleQueue())

    def _read(self) -> None:
        while True:
            try:
                messages = self.channel.receive()
            except (EOFError, ValueError):
                exit_now(1)  # the driver is gone
            for kind, payload in messages:
                if kind == "key":
                    self._box(payload[0]).put(payload[1])
                elif kind == "stop":
                    if (executor := self.executor) is None:
                        exit_now(0)
                    else:
                        executor.close()
                else:
                    self._words.put((kind, payload))

    def beat(self) -> None:
        """Say twice a second that this process lives, and what it does."""
        executor, process, pause = self.executor, psutil.Process(), threading.Event()
        assert executor is not None
        while True:
            self.channel.send("beat", [*executor.progress(), process.memory_info().rss])
            pause.wait(BEAT_SECONDS)


def _serve(config: dict[str, Any], control: Control) -> NoReturn:
    sys.path[:] = config["path"]
    sys.argv = config["argv"]
    logging.basicConfig(level=config["log_level"])
    device = torch.device(config["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    transport = rpc.RpcTransport(config["generation"])
    control.executor = executor = Executor(config["name"], transport, device=device, threads=config["threads"])
    rpc.serve((config["generation"], executor))
    control.channel.send("ready")
    control.expect("join", config["timeout"])
    timeout = config["timeout"]
    store = ExchangeStore(
        lambda key, value: control.channel.send("set", [key, value]), lambda key: control.fetch(key, timeout)
    )
    rpc.join(store, config["name"], config["numbers"], config["generation"], interface=config["interface"])
    # torch's agent closes its listener for good if a peer goes while its first connection is being made,
    # and the driver's has to serve later groups too: so that connection is made before anything can happen.
    transport.post(rpc.DRIVER, "greet").result(timeout)
    control.channel.send("joined")
    threading.Thread(target=control.beat, daemon=True, name="rpcpipe-beat").start()
    executor.serve()
    rpc.shutdown()
    exit_now(0)


def exit_now(status: int) -> NoReturn:
    """End this process. Not sys.exit: with RPC threads about, interpreter shutdown may abort."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # whoever read our output may be gone
        os._exit(status)
