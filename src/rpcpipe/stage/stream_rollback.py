"""Go back in a stream, in which some stages have applied more updates than others.

When a backward fails on stage r, or a worker dies, the later stages are ahead of the earlier ones. Every stage
therefore takes a snapshot every ``EVERY`` updates, at the same numbers of updates as all other stages. Once all stages
have taken the newer one, an older snapshot is dropped.

A stream that goes on from a snapshot of n updates feeds group n first, and computes it and some after it with versions
of the weights from before n, as they were computed when the pipeline was full. So a snapshot has those, too (``past``),
if the stream may have to go on. Forwards of later groups precede update n, so the buffers are those before group n's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from rpcpipe.errors import ModelError, require
from rpcpipe.stage.optimizer import LocalOptimizer
from rpcpipe.stage.rollback import Buffers, Undo

EVERY = 32

# By version of the weights, the values of a stage's trainable parameters.
Past = dict[int, list[torch.Tensor]]


def newest(committed: int) -> int:
    """Return the update number of the newest snapshot on all stages if all have applied ``committed`` updates."""
    return committed // EVERY * EVERY


def following(updates: int) -> int:
    """Return the update number of the first snapshot after ``updates``."""
    return newest(updates) + EVERY


@dataclass
class Snapshot:
    """A worker's state after some updates; without an optimizer there is no ``undo``."""

    undo: Undo | None
    buffers: Buffers
    past: Past = field(default_factory=dict)


class Snapshots:
    """One worker's snapshots of ``stream``: ``slots``, by the number of updates that they contain.

    ``modules``: those whose buffers forwards change. ``ended``: the live values count, but on other workers the stream
    may not have ended.
    """

    def __init__(
        self,
        stream: int,
        optimizer: LocalOptimizer | None,
        modules: Sequence[nn.Module],
        slots: Mapping[int, Snapshot] | None = None,
        *,
        ended: bool = False,
    ) -> None:
        self.stream, self.ended = stream, ended
        self._optimizer, self._modules = optimizer, modules
        self._buffers: dict[int, Buffers] = {}
        self._unused: Undo | None = None  # of a snapshot that was dropped; its memory is the next one's
        if slots is not None:
            self.slots = dict(slots)
            return
        if optimizer is not None:
            optimizer.undo.invalidate()  # an update of a synchronous step may have come after its copies
            optimizer.undo.refresh()
        self.slots = {0: Snapshot(None if optimizer is None else optimizer.undo, self._copied_buffers())}

    def _copied_buffers(self) -> Buffers:
        buffers = Buffers()
        buffers.take(self._modules)
        return buffers

    def before_forward(self, group: int) -> None:
        """Copy the buffers if a snapshot is due once all groups before ``group``, whose first forward comes, are in."""
        if group % EVERY == 0 and group not in self.slots and group not in self._buffers:
            self._buffers[group] = self._copied_buffers()

    def drop_before(self, committed: int) -> None:
        """Drop snapshots that are not needed, as all stages have applied ``committed`` updates."""
        oldest_kept = newest(committed)
        for number in [number for number in self.slots if number < oldest_kept]:
            self._unused = self.slots.pop(number).undo

    def take(self, count: int, past: Past) -> None:
        """Take a snapshot after update ``count`` of this worker."""
        undo = None
        if self._optimizer is not None:
            undo, self._unused = self._unused or Undo(self._optimizer.parameters, self._optimizer.optimizer), None
            undo.invalidate()
            undo.refresh()
        buffers = self._buffers.pop(count) if count in self._buffers else self._copied_buffers()
        self.slots[count] = Snapshot(undo, buffers, past)

    def go_back(self, count: int) -> Past:
        """Drop all snapshots but the one of ``count`` updates, from which the stream goes on; return its ``past``."""
        require(
            count in self.slots,
            f"the stream cannot go on: this worker has no snapshot of {count} updates",
            error=ModelError,
        )
        self.slots, self.ended = {count: self.slots[count]}, False
        self._buffers.clear()
        return self.slots[count].past

    def restore(self, count: int) -> None:
        """Restore the weights, the optimizer's state and the buffers after ``count`` updates."""
        slot = self.slots[count]
        if slot.undo is not None:
            slot.undo.restore()
        slot.buffers.restore()

    def close(self) -> None:
        """Drop all; the newest snapshot's memory becomes the rollback copy of synchronous steps."""
        undo = self.slots[max(self.slots)].undo
        if self._optimizer is not None and undo is not None:
            self._optimizer.undo = undo
            undo.invalidate()
