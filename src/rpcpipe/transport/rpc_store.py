"""The store over which torch RPC's agents exchange names and addresses: the control channels.

No TCPStore (unauthenticated, a listener more) and no file; a death or a Ctrl-C while the group
forms surfaces at once in ``fetch`` instead of after the store's timeout.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined]


class ExchangeStore(Store):
    """``publish(key, text)`` tells all ranks; ``fetch(key)`` waits for what any of them published.

    Implements what the agent calls; a test pins that list.
    """

    def __init__(self, publish: Callable[[str, str], Any], fetch: Callable[[str], str]) -> None:
        super().__init__()
        self._publish = publish
        self._fetch = fetch
        self._said: dict[str, bytes] = {}

    def adopt(self, other: ExchangeStore) -> None:
        """Speak to ``other``'s ranks from now on; they are told what the former ones were."""
        self._publish, self._fetch = other._publish, other._fetch
        for key, value in self._said.items():
            self.set(key, value)

    @property
    def said(self) -> dict[str, str]:
        """What this process has published, as text."""
        return {key: value.decode() for key, value in self._said.items()}

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]
        self._said[key] = value
        self._publish(key, base64.b64encode(value).decode())

    def get(self, key: str) -> bytes:
        return base64.b64decode(self._fetch(key))

    def compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:  # type: ignore[override]
        # Asked for whether the group's members are fixed and whether the own number is free: nobody objects.
        return desired

    def check(self, keys: list[str]) -> bool:
        # Asked for torch's own list of members, which nobody keeps.
        return False
