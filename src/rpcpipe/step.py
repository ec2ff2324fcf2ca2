"""One training step by hand: what ``with pipe.step() as s:`` gives."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from rpcpipe.driver import Gate
from rpcpipe.errors import Failure, RpcPipeError, StageError
from rpcpipe.interrupts import Deferred
from rpcpipe.messages import Report, StepPlan
from rpcpipe.microbatch import Nest, split
from rpcpipe.program import given
from rpcpipe.result import StepResult, by_stage, mean_loss
from rpcpipe.timeline import Timeline
from rpcpipe.trace import spans

if TYPE_CHECKING:
    from rpcpipe.pipeline import Pipeline

log = logging.getLogger("rpcpipe")


class Step:
    """A step; ``context_id`` names its distributed-autograd context inside the with-block.

    A class, not a generator: Python delivers no Ctrl-C between the return of ``__enter__`` and the
    with-block.
    """

    context_id: int

    def __init__(self, pipe: Pipeline, number: int) -> None:
        self._pipe = pipe
        self._number = number
        self._message = pipe._driver.new_step()
        self._started = time.perf_counter()
        self._result: StepResult | None = None
        self._updated = False
        self._context: AbstractContextManager[int] | None = None

    def __enter__(self) -> Step:
        try:
            with Deferred():
                self._pipe._enter(self)
                self._context = self._pipe.cluster.transport.context()
                self.context_id = self._context.__enter__()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        with Deferred():
            self._pipe._leave(self)
            if self._context is not None:
                context, self._context = self._context, None
                context.__exit__(None, None, None)
            if isinstance(error, KeyboardInterrupt) and self._updated:
                # It came after the last worker had updated, before the caller could know of it.
                self._pipe._driver.take_back(self._message)
            elif kind is None:
                self._pipe.trained += self.done

    @property
    def done(self) -> bool:
        """Has a batch been run?"""
        return self._result is not None

    def forward_backward(self, inputs: Nest, targets: Nest) -> float:
        """Run the batch; the gradients of its mean loss are then in the context. Returns the loss."""
        self._pipe._driver.settle(self._message, self.run(inputs, targets))
        return self.result().loss

    def run(self, inputs: Nest, targets: Nest) -> dict[str, Future[Any]]:
        """``forward_backward`` that does not wait until the gradients are in the context."""
        if self.done:
            raise RpcPipeError("forward_backward was called in this step already; open another step")
        pipe, driver = self._pipe, self._pipe._driver
        parts, weights = pipe._cut_batch(inputs)
        values = given(parts, split(targets, pipe.chunks), pipe.schedule.stages)
        reports = driver.run(
            pipe._train_routes(len(parts)),
            StepPlan(self._message, self._number, True, weights, trace=pipe._tracer is not None),
            values,
        )
        if pipe._tracer is not None:
            pipe._tracer.step(reports, self._number)
        loss, count = mean_loss(reports, weights)
        gate = Gate.of(reports, count, pipe.clip_grad_norm)
        if not gate.finite:
            self._refuse_nonfinite(reports)
            log.warning("step %d: the gradient's norm is %s; no weight changes", self._number, gate.grad_norm)
        self._result = StepResult(
            self._number,
            loss,
            gate.grad_norm,
            time.perf_counter() - self._started,
            by_stage(reports, "peak_in_flight"),
            gate.finite,
            Timeline(spans(reports, pipe._offsets, self._number), workers=len(reports), name=pipe.schedule.name),
            peak_activation_bytes=by_stage(reports, "peak_bytes"),
            recomputed=by_stage(reports, "recomputed"),
        )
        pipe._note(self._result.timeline)
        return driver.hand_over(self._message, self.context_id, gate) if gate.finite else {}

    def _refuse_nonfinite(self, reports: Mapping[str, Report]) -> None:
        """Where the user wants to stop: name a stage whose gradient is NaN or Inf, the latest, as backwards go."""
        if self._pipe.nonfinite == "skip":
            return
        norms = {stage: (name, norms) for name, report in reports.items() for stage, norms in report.norms.items()}
        for stage, (name, found) in sorted(norms.items(), reverse=True):
            if not all(map(math.isfinite, found)):
                message = f"a gradient of stage {stage} is not finite (nonfinite='stop')"
                raise StageError.of(Failure.stated(FloatingPointError, message, worker=name, stage=stage))

    def optimize(self) -> None:
        """Apply the gradients on all workers, or on none."""
        self._pipe.optimizer.step()

    def apply(self) -> None:
        """What ``optimize`` does once a learning-rate scheduler has counted the call."""
        if not self.result().applied:
            return
        self._updated = True  # before it is true: taking back what was not done does no harm
        times = self._pipe._driver.optimize(self._message, self.context_id, self._pipe.optimizer.changes())
        if self._pipe._tracer is not None:
            self._pipe._tracer.update(times, self._number)

    def result(self) -> StepResult:
        """The figures so far; raises RpcPipeError before ``forward_backward``."""
        if self._result is None:
            raise RpcPipeError("call s.forward_backward(inputs, targets) first")
        return dataclasses.replace(self._result, seconds=time.perf_counter() - self._started)
