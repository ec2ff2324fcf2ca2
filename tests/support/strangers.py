"""What comes to RPC ports: bytes of other users, and connections that end at once."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterable

import psutil

import rpcpipe as rp
from rpcpipe.transport.gate import Gate
from rpcpipe.transport.rpc import this_process
from support.faults import wait_for

Place = tuple[str, int]

# What a stranger sends: a length that no memory has, and the hellos of two other protocols.
_SEND = """
import os, select, socket, sys
user, *places = sys.argv[1:]
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(int(user)); os.setuid(int(user))
payloads = (b"\\xff" * 8, b"GET / HTTP/1.0\\r\\n\\r\\n", bytes.fromhex("16030100c8010000c40303") + bytes(194))
waiting, answered = {}, set()
poll = select.poll()
for place in places:
    address, _, port = place.rpartition(":")
    for payload in payloads:
        connection = socket.socket()
        connection.setblocking(False)
        connection.connect_ex((address, int(port)))
        waiting[connection.fileno()] = connection, place, payload
        poll.register(connection, select.POLLOUT)
while waiting and (ready := poll.poll(250)):
    for fd, events in ready:
        connection, place, payload = waiting.pop(fd)
        poll.unregister(fd)
        if not events & select.POLLERR:
            answered.add(place)
            connection.sendall(payload)
            connection.shutdown(socket.SHUT_WR)
print(*answered)
"""
NOBODY = 65534


def ports(pids: Iterable[int]) -> list[Place]:
    """Where the processes listen, by TCP."""
    found = [one for pid in pids for one in psutil.Process(pid).net_connections("tcp")]
    return [(one.laddr.ip, one.laddr.port) for one in found if one.status == psutil.CONN_LISTEN]


def send_as_stranger(places: Iterable[Place], *, user: int = NOBODY, prefix: Iterable[str] = ()) -> list[str]:
    """Send what strangers send to all ``places``, as another user where this one may; return those that answered."""
    names = [f"{address}:{port}" for address, port in places]
    done = subprocess.run(
        [*prefix, sys.executable, "-c", _SEND, str(user), *names],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return done.stdout.split()


def gate() -> Gate:
    assert this_process.agent is not None
    return this_process.agent.gate


def lose_own_listener() -> None:
    """Connect to this process's agent and go, which closes its listener for good, as a worker's death then does."""
    own = gate()
    own.open()
    with socket.create_connection((own.address, own.port), 5) as connection:
        # Whoever is let in is sent an urgent byte.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        assert connection.recv(1)
    own.close()
    wait_for(lambda: not own.listening)


def lose_listener(cluster: rp.Cluster, worker: str) -> None:
    cluster.call(worker, lose_own_listener)
