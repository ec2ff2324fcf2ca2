"""Keep a worker's memory open, so that a successor can take over what a dead worker had."""

from __future__ import annotations

import os
import weakref

from rpcpipe.stage.kept_memory import Head, look


class KeptDescriptor:
    """Number ``descriptor`` of process ``pid``, opened here: what lies there stays until ``close``, whoever dies.

    To be opened while that process lives. Raises OSError if it does not, or is another user's.
    """

    def __init__(self, pid: int, descriptor: int) -> None:
        self._own = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
        self._close = weakref.finalize(self, os.close, self._own)

    @property
    def path(self) -> str:
        """What a successor opens, while this process lives."""
        return f"/proc/{os.getpid()}/fd/{self._own}"

    @property
    def alive(self) -> bool:
        """Return True: it is held by this process."""
        return True

    def look(self) -> Head:
        """Return the step that the worker began last, whether its update may have begun, and what could go on."""
        return look(self._own)

    def close(self) -> None:
        """Let go of the memory, which is free once no process has it."""
        self._close()
