from __future__ import annotations

import socket
import time

import pytest

from rpcpipe.cluster.control_channel import Channel


def pair() -> tuple[Channel, socket.socket]:
    ours, theirs = socket.socketpair()
    return Channel(ours), theirs


def test_messages_come_whole_and_in_order() -> None:
    channel, other = pair()
    with other:
        Channel(other).send("one", {"a": [1, "ü"]})
        other.sendall(b'["two", null]\n["thr')
        found = channel.receive()
        while len(found) < 2:
            found += channel.receive()
        assert found == [("one", {"a": [1, "ü"]}), ("two", None)]
        other.sendall(b'ee", 3]\n')
        assert channel.receive() == [("three", 3)]
    channel.close()


@pytest.mark.parametrize(
    "line", [b"{}", b"[]", b"[1, 2]", b'["a"]', b"nonsense", b"\xff\xfe", b"[" * 100_000, b'"', b"9" * 5000]
)
def test_what_is_no_message_is_refused(line: bytes) -> None:
    channel, other = pair()
    with other:
        other.sendall(line + b"\n")
        with pytest.raises(ValueError):  # noqa: PT012
            for _ in range(100):
                channel.receive()
    channel.close()


def test_an_endless_line_is_refused() -> None:
    ours, other = socket.socketpair()
    channel = Channel(ours, longest=100)
    with other:
        other.sendall(b"x" * 101)
        with pytest.raises(ValueError, match="more than 100 bytes"):
            channel.receive()
    channel.close()


def test_the_end_and_a_dead_peer() -> None:
    channel, other = pair()
    other.close()
    with pytest.raises(EOFError):
        channel.receive()
    channel.send("into", "the void")  # no error: the watch reports deaths
    channel.close()


def test_a_peer_that_does_not_read_holds_no_driver_up() -> None:
    ours, other = socket.socketpair()
    channel = Channel(ours, patient=False)
    with other:
        start = time.monotonic()
        channel.send("much", "x" * 10_000_000)
        assert time.monotonic() - start < 3.0  # the socket's limit, once for each half-done write
    channel.close()


def test_next_waits_until_its_time_and_keeps_the_rest() -> None:
    channel, other = pair()
    with other:
        other.sendall(b'["a", 1]\n["b", 2]\n')
        assert channel.next(time.monotonic() + 1) == ("a", 1)
        assert channel.take_buffered() == [("b", 2)]
        with pytest.raises(EOFError):
            channel.next(time.monotonic() + 0.01)
    channel.close()


def test_it_is_open_until_the_peer_ends_or_it_is_shut() -> None:
    channel, other = pair()
    assert channel.open
    other.sendall(b'["last words", null]\n')
    assert channel.open
    channel.receive()
    other.close()
    assert not channel.open  # although nobody has received the end
    channel.close()
    channel, other = pair()
    channel.shut()
    assert not channel.open
    with pytest.raises(EOFError):
        channel.receive()
    other.close()
    channel.close()
    assert not channel.open


def test_a_message_that_may_take_as_long_as_it_likes() -> None:
    channel, other = pair()
    with other:
        Channel(other).send("late")
        assert channel.next(float("inf")) == ("late", None)
    channel.close()
