"""Train on one batch, whatever the schedule."""

from __future__ import annotations

from rpcpipe.driver.callbacks import tell
from rpcpipe.driver.inference import Wanted
from rpcpipe.driver.result import StepResult
from rpcpipe.driver.runtime import Runtime
from rpcpipe.driver.step import Step, train_once
from rpcpipe.driver.stream import Stream
from rpcpipe.errors import ScheduleError
from rpcpipe.model.microbatch import Nest
from rpcpipe.stage.metrics import Metrics


def train_batch(runtime: Runtime, inputs: Nest, targets: Nest, metrics: Metrics | None, outputs: bool) -> StepResult:
    """Run one batch to its update; return the result with ``metrics`` and, if asked for, the outputs."""
    runtime.check_trains()
    if runtime.policy is not None:
        runtime.check()
        stream = Stream(runtime, Wanted.of(runtime, metrics, outputs))
        stream.feed(inputs, targets)
        stream.flush()
        return stream.take()

    def step() -> StepResult:
        runtime.check()
        step = Step(runtime, runtime.trained, Wanted.of(runtime, metrics, outputs), updates_at_once=True)
        return train_once(step, inputs, targets)

    result = runtime.healed(step)
    runtime.history.tick()
    tell(runtime.callbacks, result)
    return result


def step_by_hand(runtime: Runtime) -> Step:
    """Return a step for the user to run; raises ScheduleError under an asynchronous schedule."""
    runtime.check()
    runtime.check_trains()
    if runtime.policy is not None:
        raise ScheduleError(
            f"{runtime.schedule.name!r} updates as it goes; a step by hand needs a synchronous schedule"
        )
    return Step(runtime, runtime.trained, by_hand=True)
