"""Roll back a failed stream, in which some stages have applied more updates than others.

When a backward fails on stage r, the later stages are ahead of the earlier ones. Every stage therefore
takes a snapshot of its parameters and optimizer state every ``EVERY`` updates, at the same numbers of
updates as all other stages. An older snapshot is dropped once all stages have taken the newer one.
"""

from __future__ import annotations

from rpcpipe.stage.optimizer import LocalOptimizer
from rpcpipe.stage.rollback import Undo

EVERY = 32


def newest(committed: int) -> int:
    """Return the update number of the newest snapshot on all stages if all have applied ``committed`` updates."""
    return committed // EVERY * EVERY


class Snapshots:
    """One worker's snapshots, by the number of updates that they contain."""

    def __init__(self, optimizer: LocalOptimizer) -> None:
        self._optimizer = optimizer
        self._slots = {0: optimizer.undo}
        optimizer.undo.invalidate()  # an update of a synchronous step may have come after its copies
        optimizer.undo.refresh()

    def updated(self, count: int, committed: int) -> None:
        """Take and drop snapshots after update ``count`` of this worker; all stages have applied ``committed``."""
        oldest_kept = newest(committed)
        self._slots = {number: slot for number, slot in self._slots.items() if number >= oldest_kept}
        if count % EVERY == 0:
            self._slots[count] = Undo(self._optimizer.parameters, self._optimizer.optimizer)
            self._slots[count].refresh()

    def restore(self, count: int) -> None:
        """Restore the weights and the optimizer's state after ``count`` updates."""
        self._slots[count].restore()

    def close(self) -> None:
        """End the stream; the newest snapshot's memory becomes the rollback copy of synchronous steps."""
        self._optimizer.undo = self._slots[max(self._slots)]
        self._optimizer.undo.invalidate()
