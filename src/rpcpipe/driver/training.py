"""Train on one batch, whatever the schedule."""

from __future__ import annotations

from collections.abc import Mapping

from rpcpipe.driver.callbacks import tell
from rpcpipe.driver.inference import Wanted
from rpcpipe.driver.result import StepResult
from rpcpipe.driver.runtime import Runtime
from rpcpipe.driver.step import Step, train_once
from rpcpipe.driver.stream import Stream
from rpcpipe.errors import ScheduleError
from rpcpipe.model.microbatch import Nest
from rpcpipe.stage.metrics import Metric


def train_batch(
    runtime: Runtime, inputs: Nest, targets: Nest, metrics: Mapping[str, Metric] | None, outputs: bool
) -> StepResult:
    """Run one batch to its update; return the result with ``metrics`` and, if asked for, the outputs."""
    runtime.check_trains()
    if runtime.policy is not None:
        runtime.check()
        stream = Stream(runtime, Wanted.of(runtime, metrics, outputs))
        stream.feed(inputs, targets)
        stream.flush()
        return stream.take()

    def step() -> StepResult:
        return train_once(new_step(runtime, metrics, outputs, updates_at_once=True), inputs, targets)

    result = runtime.healed(step)
    runtime.history.tick()
    tell(runtime.callbacks, result)
    return result


def new_step(
    runtime: Runtime,
    metrics: Mapping[str, Metric] | None = None,
    outputs: bool = False,
    *,
    updates_at_once: bool = False,
) -> Step:
    """Return a step that reports ``metrics`` and ``outputs``; ``updates_at_once`` as for ``Step``.

    Raises ScheduleError under an asynchronous schedule.
    """
    runtime.check()
    runtime.check_trains()
    if runtime.policy is not None:
        raise ScheduleError(
            f"{runtime.schedule.name!r} updates as it goes; a step by hand needs a synchronous schedule"
        )
    return Step(runtime, runtime.trained, Wanted.of(runtime, metrics, outputs), updates_at_once=updates_at_once)
