"""The driver's join port: lets in who knows the secret, and is not held up by who does not."""

from __future__ import annotations

import ipaddress
import logging
import socket
import time
from collections.abc import Mapping
from typing import Any

import psutil

from rpcpipe.cluster import authentication
from rpcpipe.cluster.authentication import Refused
from rpcpipe.cluster.control_channel import Channel, Message, guard
from rpcpipe.cluster.monitor import Watch, heartbeat_seconds
from rpcpipe.cluster.process import Reader
from rpcpipe.errors import RendezvousError

_BACKLOG = 128
# Strangers that may be half-way through the handshake at once; the oldest makes room for the next.
_NEWCOMERS = 64

log = logging.getLogger("rpcpipe")


class Door:
    """Listens at ``address:port`` (0: any port). Its events: ("hello", (hello, channel))."""

    def __init__(self, watch: Watch, secret: bytes, address: str, port: int) -> None:
        self._watch = watch
        self._secret = secret
        self._newcomers: list[_Newcomer] = []
        if ipaddress.ip_address(address).is_global:
            log.warning("listening for workers on the public address %s; a private network is meant", address)
        try:
            self._socket = socket.create_server((address, port), family=_family(address), backlog=_BACKLOG)
        except OSError as error:
            raise RendezvousError(
                f"cannot listen on {address}:{port}: {error.strerror}{_user_of(port)}. Choose another MASTER_PORT, the"
                " same on all hosts"
            ) from error
        self._socket.setblocking(False)
        self.port: int = self._socket.getsockname()[1]
        watch.add(self)

    def sources(self) -> Mapping[int, Reader]:
        return {self._socket.fileno(): self._accept}

    def _accept(self) -> list[Message]:
        try:
            connection, _ = self._socket.accept()
        except OSError:
            return []  # gone again, or no descriptors left
        self.sweep(_NEWCOMERS - 1)
        newcomer = _Newcomer(self, connection, self._secret)
        self._newcomers.append(newcomer)
        self._watch.add(newcomer)
        return []

    def sweep(self, most: int = _NEWCOMERS) -> None:
        """Turn away who has taken too long, and the oldest beyond ``most``."""
        now = time.monotonic()
        late = [one for one in self._newcomers if one.until < now]
        for newcomer in {*late, *self._newcomers[: max(0, len(self._newcomers) - most)]}:
            self.dismiss(newcomer)
            newcomer.channel.close()

    def dismiss(self, newcomer: _Newcomer) -> None:
        """It is no newcomer any more."""
        self._watch.forget(newcomer)
        self._newcomers.remove(newcomer)

    def close(self) -> None:
        """Listen no longer."""
        self.sweep(0)
        self._watch.forget(self)
        self._socket.close()


class _Newcomer:
    """Somebody who has connected and must prove that they know the secret."""

    def __init__(self, door: Door, connection: socket.socket, secret: bytes) -> None:
        self.until = time.monotonic() + authentication.SECONDS
        connection.setblocking(True)
        self.channel = Channel(connection, longest=authentication.LONGEST, patient=False)
        guard(connection, heartbeat_seconds())
        self._door = door
        self._secret = secret
        self._challenge = authentication.nonce()
        self.channel.send("challenge", self._challenge)

    def sources(self) -> Mapping[int, Reader]:
        return {self.channel.fileno(): self._read}

    def _read(self) -> list[Message] | None:
        try:
            messages = self.channel.receive()
            if not messages:
                return []
            (kind, payload), *more = messages
            if kind != "hello" or more:
                raise Refused("not a worker of rpcpipe")
            hello, proof = authentication.check_answer(self._secret, self._challenge, payload)
        except (EOFError, ValueError, Refused) as error:
            if isinstance(error, Refused):
                log.warning("a newcomer from %s was refused: %s", self._peer(), error)
                self.channel.send("refused", str(error))
            self._door.dismiss(self)
            self.channel.close()
            return []
        self._door.dismiss(self)
        self.channel.longest = 1 << 20
        self.channel.send("welcome", proof)
        return [("hello", (hello, self.channel))]

    def _peer(self) -> str:
        try:
            return str(self.channel.sock.getpeername()[0])
        except OSError:
            return "an address that is gone"


def knock(connection: socket.socket, secret: bytes, hello: dict[str, Any]) -> Channel:
    """The worker's side of the handshake over a fresh connection; raises Refused, EOFError, ValueError."""
    channel = Channel(connection, longest=authentication.LONGEST)
    until = time.monotonic() + authentication.SECONDS
    challenge = _one(channel, "challenge", until)
    sent = authentication.answer(secret, challenge, hello)
    channel.send("hello", sent)
    authentication.check_welcome(secret, challenge, sent, _one(channel, "welcome", until))
    channel.longest = 1 << 20
    return channel


def _one(channel: Channel, wanted: str, until: float) -> Any:
    kind, payload = channel.next(until)
    if kind == "refused":
        raise Refused(str(payload))
    if kind != wanted:
        raise Refused("whoever listens there is no rpcpipe driver")
    return payload


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _user_of(port: int) -> str:
    """Who listens at ``port``, where the system tells."""
    try:
        found = [
            c
            for c in psutil.net_connections("tcp")
            if c.status == psutil.CONN_LISTEN and c.laddr and c.laddr.port == port
        ]
        return next((f" by {psutil.Process(c.pid).name()} (pid {c.pid})" for c in found if c.pid), "")
    except psutil.Error:
        return ""
