"""The parameters of the step and of the micro-batch that a stage computes."""

from __future__ import annotations

from typing import NamedTuple

from rpcpipe.schedules.weight_versions import Policy


class MicroBatch(NamedTuple):
    """The parameters of one micro-batch on a stage.

    ``rng_step`` and ``position`` seed the random numbers; ``weight`` is the factor of the loss. In a stream
    ``group`` is the number of the update that the micro-batch contributes to, ``last`` is set on the group's
    last micro-batch, and ``alone`` on a group's only one.
    """

    rng_step: int
    position: int
    weight: float
    group: int | None = None
    last: bool = False
    alone: bool = False


class StepContext(NamedTuple):
    """The parameters of the step that a worker executes.

    ``step`` identifies the step in every message and is never reused. ``rng_step``, the number of training
    steps done before, seeds the random numbers, so that neither a failed step nor an evaluation changes
    them. ``weights[chunk]`` is the micro-batch's share of the batch and the factor of its loss. A stream is
    one step without end; ``policy`` determines the version of the weights that its minibatches use, and with
    ``stop`` a loss or gradient that is not finite ends the stream.

    Gradients are added to those of step ``accumulates_on``, if any; ``updates`` is set if an update follows.
    In training the last stage computes metrics if ``measures`` is set, and keeps its outputs if ``keep_outputs`` is.
    The loss is multiplied by ``scale`` for the backward, and the gradients are divided by ``scale`` before
    the update. With ``ahead`` the step before may not be settled on all workers.
    """

    step: int
    rng_step: int
    training: bool
    weights: tuple[float, ...]
    keep_outputs: bool = False
    trace: bool = False
    policy: Policy | None = None
    stop: bool = False
    scale: float = 1.0
    accumulates_on: int | None = None
    updates: bool = True
    measures: bool = False
    ahead: bool = False

    def micro_batch(self, chunk: int) -> MicroBatch:
        """Return the parameters of micro-batch ``chunk`` in a synchronous step."""
        return MicroBatch(self.rng_step, chunk, self.weights[chunk] if self.weights else 1.0)
