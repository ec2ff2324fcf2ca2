"""Roll back a failed stream, in which some stages have applied more updates than others.

When a backward fails on stage r, the later stages are ahead of the earlier ones. Every stage therefore
takes a snapshot of its parameters and optimizer state every ``EVERY`` updates, at the same numbers of
updates as all other stages. An older snapshot is dropped once all stages have taken the newer one.
"""

from __future__ import annotations

from collections.abc import Mapping

from rpcpipe.stage.hyperparameters import Groups
from rpcpipe.stage.optimizer import LocalOptimizer
from rpcpipe.stage.rollback import Copies, Undo

EVERY = 32


def newest(committed: int) -> int:
    """Return the update number of the newest snapshot on all stages if all have applied ``committed`` updates."""
    return committed // EVERY * EVERY


class Snapshots:
    """One worker's snapshots: ``slots``, by the number of updates that they contain."""

    def __init__(self, optimizer: LocalOptimizer, slots: Mapping[int, tuple[Copies, Groups]] | None = None) -> None:
        self._optimizer = optimizer
        self.slots = {0: optimizer.undo}
        if slots is None:
            optimizer.undo.invalidate()  # an update of a synchronous step may have come after its copies
            optimizer.undo.refresh()
        else:
            self.slots = {number: Undo(optimizer.parameters, optimizer.optimizer) for number in slots}
            for number, taken in slots.items():
                self.slots[number].take_over(None, *taken)

    def updated(self, count: int, committed: int) -> None:
        """Take and drop snapshots after update ``count`` of this worker; all stages have applied ``committed``."""
        oldest_kept = newest(committed)
        self.slots = {number: slot for number, slot in self.slots.items() if number >= oldest_kept}
        if count % EVERY == 0:
            self.slots[count] = Undo(self._optimizer.parameters, self._optimizer.optimizer)
            self.slots[count].refresh()

    def restore(self, count: int) -> None:
        """Restore the weights and the optimizer's state after ``count`` updates."""
        self.slots[count].restore()

    def close(self) -> None:
        """End the stream; the newest snapshot's memory becomes the rollback copy of synchronous steps."""
        self._optimizer.undo = self.slots[max(self.slots)]
        self._optimizer.undo.invalidate()
