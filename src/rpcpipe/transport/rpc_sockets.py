"""Cut the connections of torch RPC's agent to a process whose host is gone.

torch looks at a connection only when something arrives, and from a host that is gone nothing does, not even its end:
calls to it would wait for as long as the kernel tries, a quarter of an hour or for ever.
"""

from __future__ import annotations

import base64
import contextlib
import os
import socket

import psutil


def address_key(wire: str) -> str:
    """Return the key under which torch's agent of the process ``wire`` publishes where it listens."""
    return f"addrs/{wire}"


def cut(published: str) -> None:
    """Shut this process's connections to the agent that has ``published`` where it listens: calls to it fail now.

    ``published`` is a value of an ``ExchangeStore``. Any thread may call this.
    """
    host, _, port = base64.b64decode(published).decode().rpartition("://")[2].rpartition(":")
    address = host.strip("[]"), int(port)
    for connection in psutil.Process().net_connections("tcp"):
        if connection.raddr and tuple(connection.raddr) == address:
            _shut(connection.fd, address)


def _shut(descriptor: int, address: tuple[str, int]) -> None:
    # It may be closed meanwhile, and the descriptor another's.
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
        if connection.getpeername()[:2] == address:
            connection.shutdown(socket.SHUT_RDWR)
