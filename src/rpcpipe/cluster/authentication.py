"""Joining: both sides prove that they know the secret before either believes the other anything.

    driver → worker   challenge  {nonce}
    worker → driver   hello      {nonce, hello, proof}     proof over both nonces and the hello
    driver → worker   welcome    {proof}                   or refused, with the reason

HMAC-SHA256 (RFC 2104) over the role, both nonces and the hello: nothing can be replayed, and an answer
cannot be sent back as one's own. Pure functions; no pickle is read before or after.
"""

from __future__ import annotations

import hmac
import json
import platform
import secrets
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rpcpipe.errors import RendezvousError

# What a newcomer may send in all before it is believed.
LONGEST = 4096
SECONDS = 5.0

_FIELDS = {"rank": int, "world_size": int, "host": str, "pid": int, "gpus": int, "versions": dict}


class Refused(RendezvousError):
    """Whoever is at the other end is not let in, for this reason."""


def nonce() -> str:
    """256 random bits."""
    return secrets.token_hex(32)


def proof(secret: bytes, role: str, challenge: str, answer: str, hello: Any) -> str:
    """That ``role`` ("driver" or "worker") knows the secret, now and about this hello."""
    text = json.dumps([role, challenge, answer, hello], sort_keys=True)
    return hmac.digest(secret, text.encode(), "sha256").hex()


def answer(secret: bytes, challenge: Any, hello: dict[str, Any]) -> dict[str, Any]:
    """The worker's reply to the driver's challenge."""
    if not isinstance(challenge, str) or len(challenge) != 64:
        raise Refused("whoever listens there is no rpcpipe driver")
    mine = nonce()
    return {"nonce": mine, "hello": hello, "proof": proof(secret, "worker", challenge, mine, hello)}


def check_answer(secret: bytes, challenge: str, payload: Any) -> tuple[dict[str, Any], str]:
    """The driver's side: (the worker's hello, the proof to send back); raises Refused."""
    if not isinstance(payload, dict) or set(payload) != {"nonce", "hello", "proof"}:
        raise Refused("not a worker of rpcpipe")
    theirs, hello, given = payload["nonce"], payload["hello"], payload["proof"]
    if not isinstance(theirs, str) or not isinstance(given, str) or not given.isascii():
        raise Refused("not a worker of rpcpipe")
    if not hmac.compare_digest(given, proof(secret, "worker", challenge, theirs, hello)):
        raise Refused("the secrets differ: give every rank the same RPCPIPE_SECRET")
    if not isinstance(hello, dict) or any(type(hello.get(name)) is not kind for name, kind in _FIELDS.items()):
        raise Refused(f"its hello is of another version of rpcpipe: {sorted(hello)}")
    return hello, proof(secret, "driver", challenge, theirs, hello)


def check_welcome(secret: bytes, challenge: str, sent: dict[str, Any], payload: Any) -> None:
    """The worker's side: the driver knows the secret too; raises Refused."""
    wanted = proof(secret, "driver", challenge, sent["nonce"], sent["hello"])
    if not isinstance(payload, str) or not payload.isascii() or not hmac.compare_digest(payload, wanted):
        raise Refused("whoever listens there does not know the secret; nothing was accepted from it")


def versions() -> dict[str, str]:
    """What must be the same on all hosts: pickles of code do not travel between Python versions."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in ("torch", "rpcpipe"):
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def version_complaint(theirs: dict[str, Any], where: str) -> str | None:
    """What differs between ``theirs`` and this process's versions."""
    mine = versions()
    different = [
        f"{name} {theirs.get(name)} there, {mine[name]} here" for name in mine if theirs.get(name) != mine[name]
    ]
    return f"{where} has other versions: {'; '.join(different)}. Install the same everywhere" if different else None
