"""Let torch RPC's agents exchange names and addresses over the control channels.

Not a TCPStore, which is unauthenticated and one more listener, and not a file: a death or a Ctrl-C while the
group forms surfaces at once in ``fetch`` instead of after the store's timeout.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from torch.distributed import Store  # type: ignore[attr-defined]

from rpcpipe.transport.gate import Gate

_ADDRESSES = "addrs/"  # before the wire names in the keys of where agents listen


class ExchangeStore(Store):
    """A torch Store. ``publish(key, text)`` tells all ranks; ``fetch(key)`` waits for what any of them published.

    Implements what the agent calls; a test pins that list.
    """

    def __init__(self, publish: Callable[[str, str], Any], fetch: Callable[[str], str]) -> None:
        super().__init__()
        self.publish = publish
        self.fetch = fetch
        self._gate: Gate | None = None
        self._values: dict[str, bytes] = {}

    def adopt(self, other: ExchangeStore) -> None:
        """Exchange with ``other``'s ranks from now on, which get what this process has published so far."""
        self.publish, self.fetch = other.publish, other.fetch
        for key, value in self._values.items():
            self.set(key, value)

    @property
    def published(self) -> dict[str, str]:
        """Return what this process has published, as text."""
        return {key: value.decode() for key, value in self._values.items()}

    def own_gate(self) -> Gate:
        """Return the gate before the port of this process's agent, which has published its address."""
        assert self._gate is not None
        return self._gate

    def place(self, wire: str) -> tuple[str, int]:
        """Return the address and the port at which the agent with the wire name ``wire`` listens; wait for them."""
        url = urlsplit(self.get(_ADDRESSES + wire).decode())
        assert url.hostname is not None
        assert url.port is not None
        return url.hostname, url.port

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]
        self._values[key] = value
        if key.startswith(_ADDRESSES) and self._gate is None:  # torch has begun to listen there just now
            self._gate = Gate(*self.place(key.removeprefix(_ADDRESSES)))
        self.publish(key, base64.b64encode(value).decode())

    def get(self, key: str) -> bytes:
        own = self._values.get(key)
        return base64.b64decode(self.fetch(key)) if own is None else own

    def compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:  # type: ignore[override]
        # The agent asks whether the group's members are fixed and whether its number is free: it gets its wish.
        return desired

    def check(self, keys: list[str]) -> bool:
        # The agent asks for torch's own list of members, which does not exist here.
        return False
