"""A worker process: joins the group, then runs tasks until the driver closes or dies.

``python -m rpcpipe.worker`` runs ``main`` of the importable module, not of a second copy called
``__main__``. The control channel is a socket inherited from the driver; JSON lines, no pickle.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from typing import IO, Any

import torch
from torch.distributed import FileStore  # type: ignore[attr-defined]

from rpcpipe.executor import Executor
from rpcpipe.process import CONTROL_FD
from rpcpipe.transport import rpc


def main() -> None:
    """Serve the driver at the other end of the inherited control socket; never returns."""
    control = socket.socket(fileno=int(os.environ.pop(CONTROL_FD)))
    lines = control.makefile("r", encoding="utf-8")
    config = json.loads(lines.readline() or "null")
    if config is None:
        os._exit(1)
    sys.path[:] = config["path"]
    sys.argv = config["argv"]
    _serve(config, control, lines)


def _serve(config: dict[str, Any], control: socket.socket, lines: IO[str]) -> None:
    device = torch.device(config["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    transport = rpc.RpcTransport(config["generation"])
    executor = Executor(config["name"], transport, device=device, threads=config["threads"])
    rpc.serve((config["generation"], executor))
    _say(control, "ready")
    if lines.readline() != "join\n":
        os._exit(1)
    store = FileStore(config["store"], config["world_size"])
    rpc.join(store, config["name"], config["rank"], config["world_size"], interface="lo", timeout=config["timeout"])
    _say(control, "joined")
    threading.Thread(target=_obey, args=(lines, executor), daemon=True, name="rpcpipe-control").start()
    executor.serve()
    rpc.leave()
    _exit(0)


def _say(control: socket.socket, word: str) -> None:
    control.sendall(f"{word}\n".encode())


def _obey(lines: IO[str], executor: Any) -> None:
    """End with the driver: at its word, or at once when the channel breaks because it died."""
    try:
        word = lines.readline()
    except OSError:
        word = ""
    if word != "stop\n":
        _exit(1)
    executor.close()


def _exit(status: int) -> None:
    # Not sys.exit: with RPC threads about, interpreter shutdown may abort.
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # whoever read our output may be gone
        os._exit(status)


if __name__ == "__main__":
    from rpcpipe import worker

    worker.main()
