"""Exchange JSON lines over a stream socket, never a pickle: the control connection of driver and worker.

Every message is ``[kind, payload]``. Driver and workers speak the same way whether a socketpair or
a network lies between them.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from typing import Any

Message = tuple[str, Any]

MAX_LINE = 1 << 20
_BLOCK = 1 << 16
_SEND_SECONDS = 1


class Channel:
    """One end of a connection. ``send`` may be called from any thread, ``receive`` from one.

    ``longest``: bytes of a line that are accepted. ``patient``: ``send`` waits for a peer that does not
    read, as a pipe would; so workers' output waits for a driver that is busy. The driver itself is not
    patient: it must not be held up, and sends so little that only a peer that is lost does not take it.
    """

    def __init__(self, sock: socket.socket, *, longest: int = MAX_LINE, patient: bool = True) -> None:
        self.sock = sock
        self.longest = longest
        self._incomplete = b""
        self._lock = threading.Lock()
        self._buffered: list[Message] = []
        self._shut = False
        sock.settimeout(None)
        if not patient:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_SECONDS, 0))

    @property
    def open(self) -> bool:
        """Return whether the connection stands, as far as can be seen from here, also while nobody receives."""
        if self._shut:
            return False
        try:
            return self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def shut(self) -> None:
        """Send and hear nothing any more: whoever receives is at the end at once, whatever the peer does."""
        self._shut = True
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def fileno(self) -> int:
        """Return the socket's descriptor, for a selector."""
        return self.sock.fileno()

    def send(self, kind: str, payload: Any = None) -> None:
        """Send one message. Does not raise for a dead or stuck peer, which its monitor reports."""
        try:
            with self._lock:
                self.sock.sendall(json.dumps([kind, payload]).encode() + b"\n")
        except OSError:
            pass

    def receive(self) -> list[Message]:
        """Return the messages that have arrived; waits for the first bytes.

        Raises EOFError at the connection's end, ValueError for what is no message.
        """
        try:
            data = self.sock.recv(_BLOCK)
        except OSError as error:
            raise EOFError(str(error)) from error
        if not data:
            raise EOFError
        *lines, self._incomplete = (self._incomplete + data).split(b"\n")
        if max(map(len, [*lines, self._incomplete])) > self.longest:
            raise ValueError(f"a line of more than {self.longest} bytes")
        return [_message(line) for line in lines]

    def next(self, deadline: float) -> Message:
        """Return one message, waiting until ``deadline``; buffer those that came with it.

        ``deadline``: monotonic seconds, or infinity. Raises EOFError then, too.
        """
        while not self._buffered:
            left = deadline - time.monotonic()
            self.sock.settimeout(None if left == float("inf") else max(0.001, left))
            self._buffered = self.receive()
        self.sock.settimeout(None)
        return self._buffered.pop(0)

    def take_buffered(self) -> list[Message]:
        """Return what ``next`` has buffered, of which a selector does not know."""
        buffered, self._buffered = self._buffered, []
        return buffered

    def close(self) -> None:
        """Close the socket."""
        self._shut = True
        self.sock.close()


def _message(line: bytes) -> Message:
    try:
        value = json.loads(line)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], str):
        raise ValueError("not [kind, payload]")
    return value[0], value[1]
