"""The gate before an RPC port, on sockets of the test's own."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from rpcpipe.transport.gate import Gate, admitting, user_of
from rpcpipe.transport.listen_hook import entry_of_listen

ENDS = [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)]


@pytest.fixture(params=ENDS, ids=["IPv4", "IPv6"])
def server(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    address, family = request.param
    with socket.create_server((address, 0), family=family) as listening:
        listening.settimeout(5)
        yield listening


def connect(server: socket.socket) -> socket.socket:
    return socket.create_connection(server.getsockname()[:2], 0.2)


def test_a_gate_is_closed_when_it_is_made(server: socket.socket) -> None:
    gate = Gate(*server.getsockname()[:2])
    assert gate.listening
    with pytest.raises(TimeoutError):
        connect(server)


def test_an_open_gate_lets_this_user_in_and_a_closed_one_nobody(server: socket.socket) -> None:
    gate = Gate(*server.getsockname()[:2])
    gate.places.add((gate.address, gate.port))
    gate.open()
    with connect(server) as mine, server.accept()[0] as theirs:
        mine.sendall(b"hello")
        theirs.settimeout(5)
        assert theirs.recv(16) == b"hello"
        gate.close()
        mine.sendall(b"more")
        assert theirs.recv(16) == b"more"
        with pytest.raises(TimeoutError):
            connect(server)


def test_another_users_bytes_do_not_arrive(server: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does his end, also once the gate has been closed and opened again."""
    gate = Gate(*server.getsockname()[:2])
    monkeypatch.setattr("rpcpipe.transport.gate.user_of", lambda end, other: os.geteuid() + 1)
    gate.open()
    with connect(server) as stranger, server.accept()[0] as theirs:
        stranger.sendall(b"hello")
        stranger.close()
        gate.close()
        monkeypatch.undo()
        gate.open()
        gate.close()
        theirs.settimeout(0.3)
        with pytest.raises(TimeoutError):
            theirs.recv(16)


def test_a_host_that_is_no_members_does_not_connect(server: socket.socket) -> None:
    gate = Gate(*server.getsockname()[:2])
    gate.address = {"127.0.0.1": "127.0.0.9", "::1": "fe80::1"}[gate.address]
    gate.places.add((gate.address, gate.port))
    gate.open()
    with pytest.raises(TimeoutError):
        connect(server)
    gate.close()


def test_a_member_of_another_host_is_heard_at_once(server: socket.socket) -> None:
    gate = Gate(*server.getsockname()[:2])
    member, gate.address = gate.address, {"127.0.0.1": "127.0.0.9", "::1": "fe80::1"}[gate.address]
    gate.places.add((member, 1))
    gate.open()
    with connect(server) as mine, server.accept()[0] as theirs:
        mine.sendall(b"hello")
        assert theirs.recv(16) == b"hello"
    gate.close()


def test_many_hosts_fit_in_a_program() -> None:
    """The kernel takes 4,096 instructions."""
    assert len(admitting("10.0.0.1", {f"10.0.{high}.{low}" for high in range(5) for low in range(250)})) < 4096


def test_users_of_connections(server: socket.socket) -> None:
    with connect(server) as mine, server.accept()[0] as theirs:
        here, there = mine.getsockname()[:2], theirs.getsockname()[:2]
        assert user_of(here, there) == os.geteuid()
        mine.close()
        assert user_of(here, there) is None
    assert user_of(("127.0.0.1", 1), ("127.0.0.1", 2)) is None


def test_torch_listens_through_a_table_that_can_be_written() -> None:
    assert entry_of_listen() is not None
