"""The join port against whoever may come to it."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from rpcpipe.cluster import authentication
from rpcpipe.cluster.authentication import AuthenticationError, authenticate
from rpcpipe.cluster.join_listener import JoinListener
from rpcpipe.cluster.monitor import Monitor
from rpcpipe.errors import RendezvousError
from support.faults import wait_for

SECRET = b"a secret of enough characters"
HELLO = {"rank": 1, "world_size": 3, "host": "h", "pid": 7, "gpus": 0, "versions": {}}


class Served:
    """A listener with a thread that polls it; ``came`` collects the peers that were admitted."""

    def __init__(self) -> None:
        self.monitor = Monitor()
        self.listener = JoinListener(self.monitor, SECRET, "127.0.0.1", 0)
        self.address = "127.0.0.1", self.listener.port
        self.came: list[Any] = []
        self._stop = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop:
            events = self.monitor.poll()
            self.listener.drop_late()
            self.came += [payload for _, kind, payload in events if kind == "hello"]

    def close(self) -> None:
        self._stop = True
        self.monitor.wake()
        self._thread.join()
        self.listener.close()
        self.monitor.close()
        for _, channel in self.came:
            channel.close()

    def wait_for(self, count: int) -> None:
        wait_for(lambda: len(self.came) == count)


@pytest.fixture
def served() -> Iterator[Served]:
    opened = Served()
    yield opened
    opened.close()


def enter(served: Served, secret: bytes = SECRET) -> None:
    connection = socket.create_connection(served.address, timeout=5)
    with connection:
        authenticate(connection, secret, HELLO)


def test_an_authenticated_peer_is_accepted(served: Served) -> None:
    enter(served)
    served.wait_for(1)
    assert [hello for hello, _ in served.came] == [HELLO]


@pytest.mark.parametrize("hello", [None, 7, [], "x", {}, {**HELLO, "rank": "1"}, {**HELLO, "versions": None}])
def test_a_hello_of_another_form_is_refused(served: Served, hello: Any) -> None:
    """Of somebody who knows the secret; the next one is heard."""
    connection = socket.create_connection(served.address, timeout=5)
    with connection, pytest.raises(AuthenticationError, match="its hello is of another version"):
        authenticate(connection, SECRET, hello)
    enter(served)
    served.wait_for(1)


def test_a_peer_with_another_secret_is_told_so(served: Served) -> None:
    with pytest.raises(AuthenticationError, match="the secrets differ"):
        enter(served, b"another secret altogether")
    assert not served.came


def test_an_impostor_driver_is_not_believed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def impostor() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(json.dumps(["challenge", authentication.nonce()]).encode() + b"\n")
                connection.recv(4096)
                connection.sendall(b'["welcome", "0000"]\n')
                connection.recv(4096)

        thread = threading.Thread(target=impostor)
        thread.start()
        with (
            socket.create_connection(server.getsockname(), timeout=5) as connection,
            pytest.raises(AuthenticationError, match="does not know the secret"),
        ):
            authenticate(connection, SECRET, HELLO)
        thread.join(5)


def garbage(random: random.Random) -> bytes:
    """What a scanner, a wrong client or an attacker might send."""
    kind = random.randrange(6)
    if kind == 0:
        return random.randbytes(random.randrange(1, 300))
    if kind == 1:
        return b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    if kind == 2:
        return b"[" * random.randrange(1, 5000) + b"\n"
    if kind == 3:
        return b"x" * random.randrange(authentication.MAX_HELLO, 3 * authentication.MAX_HELLO)
    payload: Any = {"nonce": "n" * random.randrange(99), "hello": HELLO, "proof": "p" * 64}
    if kind == 4:
        payload.pop(random.choice(sorted(payload)))
    else:
        payload[random.choice(sorted(payload))] = random.choice([None, [], 1e308, "ü", {"a": {}}, -1, True])
    line = json.dumps(["hello", payload]).encode() + b"\n"
    return line[: random.randrange(1, len(line) + 1)]  # truncated anywhere, or whole


@pytest.mark.alone
def test_thousands_of_strangers_neither_crash_nor_block_the_listener() -> None:
    source = random.Random(0)
    monitor = Monitor()
    listener = JoinListener(monitor, SECRET, "127.0.0.1", 0)
    lingering: list[socket.socket] = []
    longest = 0.0
    for _ in range(4000):
        connection = socket.create_connection(("127.0.0.1", listener.port), timeout=5)
        connection.sendall(garbage(source))
        lingering.append(connection)
        if source.random() < 0.95:  # the others stay, and say no more
            lingering.pop().close()
        start = time.monotonic()
        assert monitor.poll(0) == []
        assert monitor.poll(0) == []
        longest = max(longest, time.monotonic() - start)
    assert longest < 0.5
    assert listener.pending <= 64
    for connection in lingering:
        connection.close()
    listener.close()
    monitor.close()


def test_a_slow_handshake_times_out(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authentication, "HANDSHAKE_SECONDS", 0.3)
    with socket.create_connection(served.address, timeout=5) as connection:
        start = time.monotonic()
        while connection.recv(4096):  # the challenge, then the end
            pass
        assert 0.2 < time.monotonic() - start < 2.0


def test_pending_peers_make_room_for_the_next(served: Served) -> None:
    crowd = [socket.create_connection(served.address, timeout=5) for _ in range(200)]
    enter(served)
    served.wait_for(1)
    for connection in crowd:
        connection.close()


def test_a_port_in_use_is_named(served: Served) -> None:
    monitor = Monitor()
    with pytest.raises(RendezvousError, match=rf"cannot listen on 127\.0\.0\.1:{served.listener.port}: .*in use.* by "):
        JoinListener(monitor, SECRET, "127.0.0.1", served.listener.port)
    monitor.close()
