"""A control connection: JSON lines over a stream socket, never a pickle.

Every message is ``[kind, payload]``. Driver and workers speak the same way whether a socketpair or
a network lies between them.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from typing import Any

Message = tuple[str, Any]

_LONGEST = 1 << 20
_BLOCK = 1 << 16
_SEND_SECONDS = 1


class Channel:
    """One end. ``send`` may be called from any thread, ``receive`` from one.

    ``patient``: a peer that does not read holds up who sends, as a pipe would; so workers' output
    waits for a driver that is busy. The driver itself is not patient: it must not be held up, and
    says so little that only a peer that is lost does not take it.
    """

    def __init__(self, sock: socket.socket, *, longest: int = _LONGEST, patient: bool = True) -> None:
        self.sock = sock
        self.longest = longest
        self._rest = b""
        self._lock = threading.Lock()
        self._waiting: list[Message] = []
        sock.settimeout(None)
        if not patient:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_SECONDS, 0))

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, kind: str, payload: Any = None) -> None:
        """Send one message; a dead or stuck peer does not hear it, which its watch reports."""
        try:
            with self._lock:
                self.sock.sendall(json.dumps([kind, payload]).encode() + b"\n")
        except OSError:
            pass

    def receive(self) -> list[Message]:
        """The messages that have arrived; waits for the first bytes.

        Raises EOFError at the end, ValueError for what is no message.
        """
        try:
            data = self.sock.recv(_BLOCK)
        except OSError as error:
            raise EOFError(str(error)) from error
        if not data:
            raise EOFError
        *lines, self._rest = (self._rest + data).split(b"\n")
        if max(map(len, [*lines, self._rest])) > self.longest:
            raise ValueError(f"a line of more than {self.longest} bytes")
        return [_message(line) for line in lines]

    def next(self, until: float) -> Message:
        """One message, waited for until that time (monotonic); those that came with it are kept.

        Raises EOFError when it is too late as well.
        """
        while not self._waiting:
            self.sock.settimeout(max(0.001, until - time.monotonic()))
            self._waiting = self.receive()
        self.sock.settimeout(None)
        return self._waiting.pop(0)

    def flush(self) -> list[Message]:
        """What ``next`` has kept; a selector does not tell of it."""
        found, self._waiting = self._waiting, []
        return found

    def close(self) -> None:
        """Close the socket."""
        self.sock.close()


def _message(line: bytes) -> Message:
    try:
        found = json.loads(line)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(found, list) or len(found) != 2 or not isinstance(found[0], str):
        raise ValueError("not [kind, payload]")
    return found[0], found[1]


def guard(sock: socket.socket, heartbeat: float) -> None:
    """Let the kernel notice that the other host is gone, whatever this process does.

    It takes between one and two heartbeats (seconds), whether something was being sent or not.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if heartbeat == float("inf"):
        return
    pause = max(1, round(heartbeat / 2))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, pause)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, pause)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1500 * heartbeat))
