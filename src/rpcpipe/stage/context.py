"""What a stage knows of the step and the micro-batch that it computes."""

from __future__ import annotations

from typing import NamedTuple


class MicroBatch(NamedTuple):
    """What a stage is told of one micro-batch.

    ``rng_step`` and ``position`` seed its random numbers, its loss counts ``weight``. In a stream ``group``
    numbers the update that it belongs to, ``last`` is set on the group's last micro-batch, and
    ``alone`` where it is the only one.
    """

    rng_step: int
    position: int
    weight: float
    group: int | None = None
    last: bool = False
    alone: bool = False


class StepContext(NamedTuple):
    """What a worker knows about the step it executes.

    ``step`` names it in every message and is never used again. ``rng_step`` seeds its random numbers:
    the number of training steps done so far, so that neither a failed step nor an evaluation in
    between changes what is drawn. ``weights[chunk]`` is the micro-batch's share of the batch: its
    loss counts that much. A stream is one step without end; ``policy`` says which version of the
    weights its minibatches use, ``stop`` that a loss or gradient that is not finite ends it.

    Gradients add to those of step ``accumulates_on``, if any; ``updates`` says that an update follows. The loss
    is multiplied by ``scale`` for the backward, and before the update the gradients are divided by it.
    """

    step: int
    rng_step: int
    training: bool
    weights: tuple[float, ...]
    keep_outputs: bool = False
    trace: bool = False
    policy: str | None = None
    stop: bool = False
    scale: float = 1.0
    accumulates_on: int | None = None
    updates: bool = True

    def micro_batch(self, chunk: int) -> MicroBatch:
        """What a stage is told of micro-batch ``chunk`` of a synchronous step."""
        return MicroBatch(self.rng_step, chunk, self.weights[chunk] if self.weights else 1.0)
