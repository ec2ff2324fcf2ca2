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

from rpcpipe.driver.driver import Commit
from rpcpipe.driver.gate import judge, refuse_nonfinite
from rpcpipe.driver.inference import NOTHING, Wanted
from rpcpipe.driver.result import StepResult, by_stage, mean_metrics, merged_outputs
from rpcpipe.driver.runtime import Runtime
from rpcpipe.driver.tracing import spans
from rpcpipe.errors import StateError
from rpcpipe.model.microbatch import Nest
from rpcpipe.schedules import Timeline
from rpcpipe.stage import precision
from rpcpipe.stage.context import StepContext
from rpcpipe.stage.progress import Progress
from rpcpipe.transport.interrupts import shield_interrupts
from rpcpipe.worker.agreement import Agreement, Verdict
from rpcpipe.worker.messages import Report

log = logging.getLogger("rpcpipe")


class Step:
    """A training step. ``context_id`` names its distributed-autograd context inside the with-block.

    ``updates_at_once``: the caller will update whatever the batch gives, so workers need not wait to be told.

    It is a class and not a generator because Python delivers no Ctrl-C between the return of ``__enter__``
    and the with-block.
    """

    context_id: int

    def __init__(
        self, runtime: Runtime, number: int, wanted: Wanted = NOTHING, *, updates_at_once: bool = False
    ) -> None:
        self._runtime = runtime
        self._wanted = wanted
        self._updates_at_once = updates_at_once
        # By worker, when an update that did not wait for the driver began and ended.
        self._updates: dict[str, tuple[int, int]] = {}
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
                updating = self._updated or self._updates_at_once
                self._runtime.driver.roll_back(self._message, updating=updating)
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
        commit = self._commit(plan)
        reports = driver.run(runtime.program.train(batch.counts, updates=plan.updates), plan, values, commit)
        alone = commit is not None and commit.agreement is None
        max_norm = runtime.settings.clip_grad_norm
        verdict = judge(driver, plan, self._progress, reports, batch.weights, max_norm, divided=commit is not None)
        runtime.loss_is_mean = verdict.count is None
        if alone and not runtime.loss_is_mean:
            return self._again(inputs, targets)
        sound = verdict.sound and not self._progress.spoiled
        if not sound:
            self._leave_out(plan, verdict, reports, updated=alone)
        self._record(plan, verdict, reports, applied=plan.updates and sound)
        factor = 1.0 / plan.scale / (verdict.count or 1.0)
        input_grads = runtime.input_gradients(batch, inputs, reports, factor)
        self._result = dataclasses.replace(self.result(), input_grads=input_grads)
        if commit is not None:
            self._updates = {worker: (report.updated.start, report.updated.end) for worker, report in reports.items()}
        elif self._result.applied:
            return driver.publish_gradients(self._message, self.context_id, verdict.gate.factor)
        return {}

    def _record(self, plan: StepContext, verdict: Verdict, reports: Mapping[str, Report], *, applied: bool) -> None:
        """Note what the batch has given: its place in an accumulation, its spans and its figures."""
        runtime = self._runtime
        if runtime.tracer is not None:
            runtime.tracer.step(reports, self._number)
        self._progress = self._progress.later(self._message, verdict.count, spoiled=verdict.spoiled)
        self._overflowed = any(report.overflowed for report in reports.values())
        self._result = self._results(plan, verdict, reports, applied=applied)
        runtime.note(self._result.timeline)

    def _results(
        self, plan: StepContext, verdict: Verdict, reports: Mapping[str, Report], *, applied: bool
    ) -> StepResult:
        runtime = self._runtime
        measured = spans(reports, runtime.offsets, self._number)
        return StepResult(
            step=self._number,
            loss=verdict.loss,
            grad_norm=verdict.gate.grad_norm,
            seconds=time.perf_counter() - self._started,
            peak_in_flight=by_stage(reports, "peak_in_flight"),
            applied=applied,
            timeline=Timeline(measured, workers=len(reports), name=runtime.schedule.name),
            peak_activation_bytes=by_stage(reports, "peak_bytes"),
            recomputed=by_stage(reports, "recomputed", sum),
            accumulated=self._progress.done,
            loss_scale=plan.scale,
            metrics=mean_metrics(reports),
            outputs=merged_outputs(reports),
        )

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

    def _commit(self, plan: StepContext) -> Commit | None:
        """Return the update that the workers make without the driver; None if the user may still change it."""
        runtime = self._runtime
        if not self._updates_at_once or not plan.updates or self._progress.spoiled or runtime.optimizer.has_pre_hooks:
            return None
        return Commit(self.context_id, runtime.optimizer.changes(), self._agreement(), runtime.program.after_update())

    def _agreement(self) -> Agreement | None:
        """Return how the workers agree, None if an update needs nothing of other workers.

        That is: no norm, no scale that may overflow, no exchange of gradients, and no count; that the loss is a mean
        is known from the step before.
        """
        runtime = self._runtime
        max_norm, exchanging = runtime.settings.clip_grad_norm, runtime.program.exchanges
        if runtime.loss_is_mean and max_norm is None and runtime.scaler is None and not exchanging:
            return None
        names, stages = runtime.names, runtime.schedule.placement
        tellers = names if exchanging else runtime.layout.replicas_of(stages[-1])
        return Agreement(tuple(names), tuple(tellers), max_norm, self._progress)

    def _again(self, inputs: Nest, targets: Nest) -> dict[str, Future[Any]]:
        """Run the batch once more, with a message number of its own: its updates took the loss for a mean."""
        driver = self._runtime.driver
        driver.roll_back(self._message, updating=True)
        self._message = driver.new_step()
        return self.run(inputs, targets)

    def _leave_out(self, plan: StepContext, verdict: Verdict, reports: Mapping[str, Report], *, updated: bool) -> None:
        """Let no weight change because of the ``verdict``; ``updated``: those of some workers have.

        With ``nonfinite="stop"``, raises StageError. The overflow of a finite loss under a loss scale raises nothing,
        because a smaller scale mends it.
        """
        driver, finite = self._runtime.driver, math.isfinite(verdict.loss)
        if self._runtime.settings.nonfinite == "stop" and not verdict.sound and (plan.scale == 1.0 or not finite):
            refuse_nonfinite(reports, len(self._runtime.stages) - 1)
        if not verdict.sound and not finite:
            driver.roll_back(self._message, updating=updated)  # NaN would stay in running statistics for ever
        elif updated:
            driver.take_update_back(self._message)
        norm = verdict.gate.grad_norm
        log.warning("step %d: loss %s, norm of the gradient %s; no weight changes", self._number, verdict.loss, norm)

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
        times = self._updates or self._runtime.driver.update_weights(
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
