"""The way back out of a stream that failed where later stages had updated already.

A backward that fails on stage r finds the stages after r ahead of those before. Every stage keeps a
copy of its parameters and optimizer state as they were after the same number of updates, renewed
every ``EVERY`` updates; the older one goes once all stages have passed the newer.
"""

from __future__ import annotations

from rpcpipe.stage.optimizer import LocalOptimizer
from rpcpipe.stage.rollback import Undo

EVERY = 32


def newest(committed: int) -> int:
    """The newest snapshot that all stages hold, if all have done ``committed`` updates."""
    return committed // EVERY * EVERY


class Snapshots:
    """One worker's copies, by the number of updates in them."""

    def __init__(self, optimizer: LocalOptimizer) -> None:
        self._optimizer = optimizer
        self._slots = {0: optimizer.undo}
        optimizer.undo.refresh()

    def updated(self, count: int, committed: int) -> None:
        """``count`` updates are in the weights here, ``committed`` in those of all stages."""
        kept = newest(committed)
        self._slots = {at: slot for at, slot in self._slots.items() if at >= kept}
        if count % EVERY == 0:
            self._slots[count] = Undo(self._optimizer.parameters, self._optimizer.optimizer)
            self._slots[count].refresh()

    def restore(self, count: int) -> None:
        """Go back to ``count`` updates."""
        self._slots[count].restore()

    def close(self) -> None:
        """The stream is over; one copy goes on as what takes back a failed step."""
        self._optimizer.undo = self._slots[max(self._slots)]
        self._optimizer.undo.invalidate()
