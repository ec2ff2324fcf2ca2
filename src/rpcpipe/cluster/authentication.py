"""Authenticate both ends of a join: each proves that it knows the secret before the other believes it.

    driver → worker   challenge  {nonce}
    worker → driver   hello      {nonce, hello, proof}     proof over both nonces and the hello
    driver → worker   welcome    {proof}                   or refused, with the reason

HMAC-SHA256 (RFC 2104) over the role, both nonces and the hello: nothing can be replayed, and a proof
cannot be sent back as the other side's. No pickle is read before or after.
"""

from __future__ import annotations

import hmac
import json
import os
import platform
import secrets
import socket
import stat
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rpcpipe.cluster.control_channel import MAX_LINE, Channel
from rpcpipe.errors import RendezvousError

# Limits for a peer that is not authenticated yet: bytes of a line, and seconds in all.
MAX_HELLO = 4096
HANDSHAKE_SECONDS = 5.0

_SECRET_LENGTH = 16
_FIELDS = {"rank": int, "world_size": int, "host": str, "pid": int, "gpus": int, "versions": dict}


class AuthenticationError(RendezvousError):
    """The other end is not what it should be, or refused this one; the message says why."""


# --- the secret ---


def read_secret(environ: Mapping[str, str]) -> bytes:
    """Return RPCPIPE_SECRET, or the content of the file RPCPIPE_SECRET_FILE; raises RendezvousError.

    It may be any bytes; what is no text is taken as the bytes that it is.
    """
    secret, path = environ.get("RPCPIPE_SECRET"), environ.get("RPCPIPE_SECRET_FILE")
    if secret is None and path is not None:
        secret = _read_private(Path(path))
    if secret is None:
        raise RendezvousError(
            "no secret: every rank needs the same RPCPIPE_SECRET (or RPCPIPE_SECRET_FILE), for instance from"
            " `openssl rand -hex 32`; without it anybody who reaches the port could run code here"
        )
    if len(secret) < _SECRET_LENGTH:
        raise RendezvousError(
            f"the secret has {len(secret)} characters, too few to withstand guessing: use {_SECRET_LENGTH} or more"
        )
    return os.fsencode(secret)


def _read_private(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="surrogateescape") as file:
            mode = os.fstat(file.fileno()).st_mode
            if mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise RendezvousError(f"RPCPIPE_SECRET_FILE={path} is open to others: chmod 600 {path}")
            return file.read().strip()
    except OSError as error:
        raise RendezvousError(f"RPCPIPE_SECRET_FILE={path} cannot be read: {error}") from error


# --- the handshake's messages; pure functions but for the nonces ---


def nonce() -> str:
    """Return 256 random bits in hexadecimal."""
    return secrets.token_hex(32)


def proof(secret: bytes, role: str, challenge: str, answer: str, hello: Any) -> str:
    """Return the proof that ``role`` ("driver" or "worker") knows ``secret``, over both nonces and ``hello``."""
    text = json.dumps([role, challenge, answer, hello], sort_keys=True)
    return hmac.digest(secret, text.encode(), "sha256").hex()


def answer(secret: bytes, challenge: Any, hello: dict[str, Any]) -> dict[str, Any]:
    """Return the worker's reply to the driver's challenge; raises AuthenticationError for what is no challenge."""
    if not isinstance(challenge, str) or len(challenge) != 64:
        raise AuthenticationError("whoever listens there is no rpcpipe driver")
    own_nonce = nonce()
    return {"nonce": own_nonce, "hello": hello, "proof": proof(secret, "worker", challenge, own_nonce, hello)}


def check_answer(secret: bytes, challenge: str, payload: Any) -> tuple[dict[str, Any], str]:
    """Check a worker's reply; return its hello and the proof to send back. Raises AuthenticationError."""
    if not isinstance(payload, dict) or set(payload) != {"nonce", "hello", "proof"}:
        raise AuthenticationError("not a worker of rpcpipe")
    other_nonce, hello, given = payload["nonce"], payload["hello"], payload["proof"]
    if not isinstance(other_nonce, str) or not isinstance(given, str) or not given.isascii():
        raise AuthenticationError("not a worker of rpcpipe")
    if not hmac.compare_digest(given, proof(secret, "worker", challenge, other_nonce, hello)):
        raise AuthenticationError("the secrets differ: give every rank the same RPCPIPE_SECRET")
    if not isinstance(hello, dict) or any(type(hello.get(name)) is not kind for name, kind in _FIELDS.items()):
        said = sorted(hello) if isinstance(hello, dict) else type(hello).__name__
        raise AuthenticationError(f"its hello is of another version of rpcpipe: {said}")
    return hello, proof(secret, "driver", challenge, other_nonce, hello)


def check_welcome(secret: bytes, challenge: str, sent: dict[str, Any], payload: Any) -> None:
    """Check, on the worker, that the driver knows the secret too; raises AuthenticationError."""
    wanted = proof(secret, "driver", challenge, sent["nonce"], sent["hello"])
    if not isinstance(payload, str) or not payload.isascii() or not hmac.compare_digest(payload, wanted):
        raise AuthenticationError("whoever listens there does not know the secret; nothing was accepted from it")


def authenticate(connection: socket.socket, secret: bytes, hello: dict[str, Any]) -> Channel:
    """Do the worker's side of the handshake over a fresh connection; return the channel to the driver.

    Raises AuthenticationError if either side refuses, EOFError if the connection ends or the time is up, and
    ValueError for what is no message.
    """
    channel = Channel(connection, longest=MAX_HELLO)
    deadline = time.monotonic() + HANDSHAKE_SECONDS
    challenge = _expect(channel, "challenge", deadline)
    sent = answer(secret, challenge, hello)
    channel.send("hello", sent)
    check_welcome(secret, challenge, sent, _expect(channel, "welcome", deadline))
    channel.longest = MAX_LINE
    return channel


def _expect(channel: Channel, kind: str, deadline: float) -> Any:
    received, payload = channel.next(deadline)
    if received == "refused":
        raise AuthenticationError(str(payload))
    if received != kind:
        raise AuthenticationError("whoever listens there is no rpcpipe driver")
    return payload


# --- versions ---


def versions() -> dict[str, str]:
    """Return what must be the same on all hosts: pickles of code do not travel between Python versions."""
    own = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in ("torch", "rpcpipe"):
        try:
            own[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            own[name] = "not installed"
    return own


def version_complaint(others: dict[str, Any], where: str) -> str | None:
    """Return in what ``others``, the versions at ``where``, differ from this process's; None if in nothing."""
    own = versions()
    different = [f"{name} {others.get(name)} there, {own[name]} here" for name in own if others.get(name) != own[name]]
    return f"{where} has other versions: {'; '.join(different)}. Install the same everywhere" if different else None
