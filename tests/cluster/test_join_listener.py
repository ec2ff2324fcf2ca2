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
from rpcpipe.cluster.authentication import Refused
from rpcpipe.cluster.join_listener import Door, knock
from rpcpipe.cluster.monitor import Watch
from rpcpipe.errors import RendezvousError
from support.faults import wait_for

SECRET = b"a secret of enough characters"
HELLO = {"rank": 1, "world_size": 3, "host": "h", "pid": 7, "gpus": 0, "versions": {}}


class Open:
    """A door with a thread that polls it; ``came`` collects who was let in."""

    def __init__(self) -> None:
        self.watch = Watch()
        self.door = Door(self.watch, SECRET, "127.0.0.1", 0)
        self.address = "127.0.0.1", self.door.port
        self.came: list[Any] = []
        self._stop = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop:
            events = self.watch.poll()
            self.door.sweep()
            self.came += [payload for _, kind, payload in events if kind == "hello"]

    def close(self) -> None:
        self._stop = True
        self.watch.wake()
        self._thread.join()
        self.door.close()
        self.watch.close()
        for _, channel in self.came:
            channel.close()

    def wait_for(self, count: int) -> None:
        wait_for(lambda: len(self.came) == count)


@pytest.fixture
def door() -> Iterator[Open]:
    found = Open()
    yield found
    found.close()


def enter(door: Open, secret: bytes = SECRET) -> None:
    connection = socket.create_connection(door.address, timeout=5)
    with connection:
        knock(connection, secret, HELLO)


def test_an_authenticated_peer_is_accepted(door: Open) -> None:
    enter(door)
    door.wait_for(1)
    assert [hello for hello, _ in door.came] == [HELLO]


def test_who_does_not_is_told_so(door: Open) -> None:
    with pytest.raises(Refused, match="the secrets differ"):
        enter(door, b"another secret altogether")
    assert not door.came


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
            pytest.raises(Refused, match="does not know the secret"),
        ):
            knock(connection, SECRET, HELLO)
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
        return b"x" * random.randrange(authentication.LONGEST, 3 * authentication.LONGEST)
    payload: Any = {"nonce": "n" * random.randrange(99), "hello": HELLO, "proof": "p" * 64}
    if kind == 4:
        payload.pop(random.choice(sorted(payload)))
    else:
        payload[random.choice(sorted(payload))] = random.choice([None, [], 1e308, "ü", {"a": {}}, -1, True])
    line = json.dumps(["hello", payload]).encode() + b"\n"
    return line[: random.randrange(1, len(line) + 1)]  # truncated anywhere, or whole


@pytest.mark.alone
def test_thousands_of_strangers_neither_crash_nor_block_it() -> None:
    source = random.Random(0)
    watch = Watch()
    door = Door(watch, SECRET, "127.0.0.1", 0)
    lingering: list[socket.socket] = []
    longest = 0.0
    for _ in range(4000):
        connection = socket.create_connection(("127.0.0.1", door.port), timeout=5)
        connection.sendall(garbage(source))
        lingering.append(connection)
        if source.random() < 0.95:  # the others stay, and say no more
            lingering.pop().close()
        start = time.monotonic()
        assert watch.poll(0) == []
        assert watch.poll(0) == []
        longest = max(longest, time.monotonic() - start)
    assert longest < 0.5
    assert len(door._newcomers) <= 64
    for connection in lingering:
        connection.close()
    door.close()
    watch.close()


def test_a_handshake_that_takes_too_long_is_ended(door: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authentication, "SECONDS", 0.3)
    with socket.create_connection(door.address, timeout=5) as connection:
        start = time.monotonic()
        while connection.recv(4096):  # the challenge, then the end
            pass
        assert 0.2 < time.monotonic() - start < 2.0


def test_a_crowd_makes_room(door: Open) -> None:
    crowd = [socket.create_connection(door.address, timeout=5) for _ in range(200)]
    enter(door)
    door.wait_for(1)
    for connection in crowd:
        connection.close()


def test_a_port_in_use_is_named(door: Open) -> None:
    watch = Watch()
    with pytest.raises(RendezvousError, match=rf"cannot listen on 127\.0\.0\.1:{door.door.port}: .*in use.* by "):
        Door(watch, SECRET, "127.0.0.1", door.door.port)
    watch.close()
