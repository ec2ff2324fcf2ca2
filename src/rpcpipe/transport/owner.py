"""Tell a process from its forks, which have its objects and its sockets, but none of its threads."""

from __future__ import annotations

import os

from rpcpipe.errors import StateError


class Owner:
    """The process that makes this object."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def here(self) -> bool:
        """Return whether that is the process that asks."""
        return os.getpid() == self._pid

    def check(self) -> None:
        """Raise StateError in any other process: it would read messages that are its parent's."""
        if not self.here:
            raise StateError(
                f"this process ({os.getpid()}) is a fork of the driver ({self._pid}), which alone may use the cluster"
                "; start a process that needs workers of its own by multiprocessing's 'spawn'"
            )
