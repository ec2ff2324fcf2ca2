"""Listen, on the driver, for workers that join: admit those that authenticate, and never wait for the others."""

from __future__ import annotations

import ipaddress
import logging
import socket
import time
from collections.abc import Mapping

import psutil

from rpcpipe.cluster import authentication
from rpcpipe.cluster.authentication import AuthenticationError
from rpcpipe.cluster.control_channel import MAX_LINE, Channel, Message
from rpcpipe.cluster.monitor import Monitor, heartbeat_seconds
from rpcpipe.cluster.network import enable_keepalive
from rpcpipe.cluster.process import Reader
from rpcpipe.errors import RendezvousError

_BACKLOG = 128
# Peers that may be in the handshake at once; the oldest makes room for the next.
_MAX_PENDING = 64

log = logging.getLogger("rpcpipe")


class JoinListener:
    """Listens at ``address:port`` (0: any port; ``port`` says which).

    Reports every authenticated peer to ``monitor`` as an event ("hello", (hello, channel)). Raises
    RendezvousError where it cannot listen.
    """

    def __init__(self, monitor: Monitor, secret: bytes, address: str, port: int) -> None:
        self._monitor = monitor
        self._secret = secret
        self._pending: list[PendingPeer] = []
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
        monitor.add(self)

    @property
    def pending(self) -> int:
        """Return how many peers are in the handshake."""
        return len(self._pending)

    def readers(self) -> Mapping[int, Reader]:
        """Return what to watch: the listening socket."""
        return {self._socket.fileno(): self._accept}

    def _accept(self) -> list[Message]:
        try:
            connection, _ = self._socket.accept()
        except OSError:
            return []  # gone again, or no descriptors left
        self.drop_late(_MAX_PENDING - 1)
        peer = PendingPeer(self, connection, self._secret)
        self._pending.append(peer)
        self._monitor.add(peer)
        return []

    def drop_late(self, most: int = _MAX_PENDING) -> None:
        """Disconnect the peers that have taken too long, and the oldest beyond ``most``."""
        now = time.monotonic()
        late = [peer for peer in self._pending if peer.deadline < now]
        for peer in {*late, *self._pending[: max(0, len(self._pending) - most)]}:
            self.release(peer)
            peer.channel.close()

    def release(self, peer: PendingPeer) -> None:
        """Forget ``peer``, which is authenticated or refused."""
        self._monitor.remove(peer)
        self._pending.remove(peer)

    def close(self) -> None:
        """Listen no longer, and disconnect the peers in the handshake."""
        self.drop_late(0)
        self._monitor.remove(self)
        self._socket.close()


class PendingPeer:
    """A connection whose peer must prove by ``deadline`` (monotonic seconds) that it knows the secret."""

    def __init__(self, listener: JoinListener, connection: socket.socket, secret: bytes) -> None:
        self.deadline = time.monotonic() + authentication.HANDSHAKE_SECONDS
        connection.setblocking(True)
        self.channel = Channel(connection, longest=authentication.MAX_HELLO, patient=False)
        enable_keepalive(connection, heartbeat_seconds())
        self._listener = listener
        self._secret = secret
        self._challenge = authentication.nonce()
        self.channel.send("challenge", self._challenge)

    def readers(self) -> Mapping[int, Reader]:
        """Return what to watch: the connection."""
        return {self.channel.fileno(): self._read}

    def _read(self) -> list[Message] | None:
        try:
            messages = self.channel.receive()
            if not messages:
                return []
            (kind, payload), *more = messages
            if kind != "hello" or more:
                raise AuthenticationError("not a worker of rpcpipe")
            hello, proof = authentication.check_answer(self._secret, self._challenge, payload)
        except (EOFError, ValueError, AuthenticationError) as error:
            if isinstance(error, AuthenticationError):
                log.warning("a newcomer from %s was refused: %s", self._address(), error)
                self.channel.send("refused", str(error))
            self._listener.release(self)
            self.channel.close()
            return []
        self._listener.release(self)
        self.channel.longest = MAX_LINE
        self.channel.send("welcome", proof)
        return [("hello", (hello, self.channel))]

    def _address(self) -> str:
        try:
            return str(self.channel.sock.getpeername()[0])
        except OSError:
            return "an address that is gone"


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _user_of(port: int) -> str:
    """Return who listens at ``port``, as words to add to a message; '' where the system does not tell."""
    try:
        listeners = [
            connection
            for connection in psutil.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
        ]
        return next((f" by {psutil.Process(one.pid).name()} (pid {one.pid})" for one in listeners if one.pid), "")
    except psutil.Error:
        return ""
