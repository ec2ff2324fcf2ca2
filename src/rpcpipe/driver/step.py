"""One training step by hand: the object of ``with pipe.step() as s:``."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any

from rpcpipe.driver.accumulation import Progress
from rpcpipe.driver.driver import GradientGate
from rpcpipe.driver.inference import NOTHING, Wanted
from rpcpipe.driver.result import StepResult, by_stage, mean_loss, mean_metrics, merged_outputs
from rpcpipe.driver.runtime import Runtime
from rpcpipe.driver.tracing import spans
from rpcpipe.errors import Failure, NonFiniteError, StageError, StateError
from rpcpipe.model.microbatch import Nest
from rpcpipe.schedules import Timeline
from rpcpipe.stage import precision
from rpcpipe.stage.context import StepContext
from rpcpipe.transport.interrupts import shield_interrupts
from rpcpipe.worker.messages import Report

log = logging.getLogger("rpcpipe")


class Step:
    """A training step. ``context_id`` names its distributed-autograd context inside the with-block.

    It is a class and not a generator because Python delivers no Ctrl-C between the return of ``__enter__``
    and the with-block.
    """

    context_id: int

    def __init__(self, runtime: Runtime, number: int, wanted: Wanted = NOTHING) -> None:
        self._runtime = runtime
        self._wanted = wanted
        self._number = number
        self._message = runtime.driver.new_step()
        self._started = time.perf_counter()
        self._result: StepResult | None = None
        self._progress = runtime.progress if runtime.progress.done else Progress(runtime.settings.accumulate)
        self._updated = False
        self._overflowed = False
        self._context: AbstractContextManager[int] | None = None

    def __enter__(self) -> Step:
        try:
            with shield_interrupts():
                self._runtime.enter(self)
                self._context = self._runtime.cluster.transport.context()
                self.context_id = self._context.__enter__()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        with shield_interrupts():
            self._runtime.leave(self)
            if self._context is not None:
                context, self._context = self._context, None
                context.__exit__(None, None, None)
            if kind is not None and (isinstance(error, KeyboardInterrupt) or not self._updated):
                # A Ctrl-C may come after the last worker has updated and before the caller can know of the update.
                self._runtime.driver.roll_back(self._message, updating=self._updated)
            elif kind is None and self.done:
                self._advance()

    def _advance(self) -> None:
        """Count the step, which has succeeded, and update the loss scale."""
        runtime, result = self._runtime, self.result()
        runtime.trained += 1
        runtime.progress = self._progress
        if runtime.scaler is not None and not result.accumulated:
            precision.update_loss_scale(runtime.scaler, finite=not self._overflowed)

    @property
    def done(self) -> bool:
        """Whether a batch has been run."""
        return self._result is not None

    def forward_backward(self, inputs: Nest, targets: Nest) -> float:
        """Run the batch, put the gradients of its mean loss into the context, and return the loss."""
        self._runtime.driver.settle(self._message, self.run(inputs, targets))
        return self.result().loss

    def run(self, inputs: Nest, targets: Nest) -> dict[str, Future[Any]]:
        """Run the batch like ``forward_backward``; return the replies that say when the gradients are in the context.

        Raises StateError if a batch has been run in this step already.
        """
        if self.done:
            raise StateError("forward_backward was called in this step already; open another step")
        runtime, driver = self._runtime, self._runtime.driver
        batch = runtime.program.cut(inputs)
        values = runtime.given(batch.parts, runtime.program.cut_targets(runtime.prepare(targets), batch))
        plan = self._plan(batch.weights)
        reports = driver.run(runtime.program.train(batch.counts, updates=plan.updates), plan, values)
        if runtime.tracer is not None:
            runtime.tracer.step(reports, self._number)
        loss, count = mean_loss(reports, batch.weights)
        gate = self._gate(plan, reports, count)
        spoiled = not math.isfinite(loss) and count != 0.0  # gradients of a loss of NaN may be finite
        sound = gate.finite and not spoiled and not self._progress.spoiled
        if not gate.finite or spoiled:
            self._refuse_nonfinite(plan, loss, reports)
            if not math.isfinite(loss):
                driver.roll_back(self._message, updating=False)  # NaN would stay in running statistics for ever
        if not sound:
            norm = gate.grad_norm
            log.warning("step %d: loss %s, norm of the gradient %s; no weight changes", self._number, loss, norm)
        self._progress = self._progress.later(self._message, count, spoiled=spoiled)
        measured = spans(reports, runtime.offsets, self._number)
        self._result = StepResult(
            step=self._number,
            loss=loss,
            grad_norm=gate.grad_norm,
            seconds=time.perf_counter() - self._started,
            peak_in_flight=by_stage(reports, "peak_in_flight"),
            applied=plan.updates and sound,
            timeline=Timeline(measured, workers=len(reports), name=runtime.schedule.name),
            peak_activation_bytes=by_stage(reports, "peak_bytes"),
            recomputed=by_stage(reports, "recomputed", sum),
            accumulated=self._progress.done,
            loss_scale=plan.scale,
            metrics=mean_metrics(reports),
            outputs=merged_outputs(reports),
            input_grads=runtime.input_gradients(batch, inputs, reports, 1.0 / plan.scale / (count or 1.0)),
        )
        runtime.note(self._result.timeline)
        return driver.publish_gradients(self._message, self.context_id, gate) if self._result.applied else {}

    def _plan(self, weights: Sequence[float]) -> StepContext:
        """Return the step's context; ``weights``: each micro-batch's share of the batch."""
        runtime, progress = self._runtime, self._progress
        return StepContext(
            self._message,
            self._number,
            True,
            tuple(weight / progress.calls for weight in weights),
            trace=runtime.tracer is not None,
            scale=1.0 if runtime.scaler is None else runtime.scaler.get_scale(),
            accumulates_on=progress.after,
            updates=progress.is_last,
            measures=self._wanted.measures,
            keep_outputs=self._wanted.outputs,
        )

    def _gate(self, plan: StepContext, reports: Mapping[str, Report], count: float | None) -> GradientGate:
        """Return the gate of the update's gradients, or of those accumulated so far. Normalizes the former."""
        runtime, total = self._runtime, self._progress.counted(count)
        # Judged before normalization, like GradScaler does: a count of 0 makes NaN but is no overflow of the scale.
        self._overflowed = not GradientGate.of(reports, None).finite
        if plan.updates and total is not None:
            runtime.driver.normalize_gradients(self._message, total, reports)
        gate = GradientGate.of(reports, runtime.settings.clip_grad_norm)
        if plan.updates:
            return gate
        return dataclasses.replace(gate, grad_norm=gate.grad_norm / plan.scale / (total or 1.0))

    def _refuse_nonfinite(self, plan: StepContext, loss: float, reports: Mapping[str, Report]) -> None:
        """With ``nonfinite="stop"``, raise StageError for the last stage whose gradient is not finite, or for the loss.

        The last such stage is the first in the order of the backwards. The overflow of a finite loss under a loss
        scale raises nothing, because a smaller scale mends it.
        """
        if self._runtime.settings.nonfinite == "skip" or (plan.scale > 1.0 and math.isfinite(loss)):
            return
        entries = [(stage, name, norms) for name, report in reports.items() for stage, norms in report.norms.items()]
        for stage, name, norms in sorted(entries, reverse=True):
            if not all(map(math.isfinite, norms.values())):
                message = f"a gradient of stage {stage} is not finite (nonfinite='stop')"
                raise StageError.of(Failure.stated(NonFiniteError, message, worker=name, stage=stage))
        for name, report in reports.items():
            for chunk, (value, _) in sorted(report.losses.items()):
                if not math.isfinite(value):
                    message = f"the loss of micro-batch {chunk} is {value} (nonfinite='stop')"
                    last = len(self._runtime.stages) - 1
                    raise StageError.of(Failure.stated(NonFiniteError, message, worker=name, stage=last))

    def optimize(self) -> None:
        """Apply the gradients on all workers, or on none; do nothing while they accumulate further."""
        if self.done and self.result().accumulated:
            return
        self._runtime.optimizer.step()

    def forget(self) -> None:
        """Drop the gradients accumulated so far: no later call adds to them."""
        self._progress = self._progress._replace(done=0, after=None, total=None, spoiled=False)

    def apply(self) -> None:
        """Update the weights. ``optimize`` leads here through the optimizer, whose calls schedulers count."""
        if not self.result().applied:
            return
        self._updated = True  # set before the update: rolling back an update that did not happen is harmless
        times = self._runtime.driver.update_weights(
            self._message, self.context_id, self._runtime.optimizer.changes(), self._runtime.program.after_update()
        )
        if self._runtime.tracer is not None:
            self._runtime.tracer.update(times, self._number)

    def result(self) -> StepResult:
        """Return the figures so far. Raises StateError before ``forward_backward``."""
        if self._result is None:
            raise StateError("call s.forward_backward(inputs, targets) first")
        return dataclasses.replace(
            self._result, seconds=time.perf_counter() - self._started, lr=self._runtime.optimizer.lr
        )
