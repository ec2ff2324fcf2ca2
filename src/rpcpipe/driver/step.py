"""One training step by hand: the object of ``with pipe.step() as s:``."""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

from rpcpipe.driver.callbacks import tell
from rpcpipe.driver.course import Course, Cut, Issued
from rpcpipe.driver.ending import Committing, Ending
from rpcpipe.driver.gate import judge, refuse_nonfinite
from rpcpipe.driver.inference import NOTHING, Wanted
from rpcpipe.driver.one_way import one_way
from rpcpipe.driver.result import StepResult, by_stage, mean_metrics, merged_outputs
from rpcpipe.driver.roles import StepRecord
from rpcpipe.driver.runtime import Runtime
from rpcpipe.driver.succession import healed
from rpcpipe.driver.tracing import spans
from rpcpipe.driver.turn import Turn, in_turn
from rpcpipe.errors import StateError, WorkerLost, require
from rpcpipe.model.batch import Size
from rpcpipe.model.microbatch import Nest
from rpcpipe.model.nest_types import NestOfTensors
from rpcpipe.schedules import Timeline
from rpcpipe.stage import precision
from rpcpipe.stage.context import StepContext
from rpcpipe.transport.interrupts import shield_interrupts
from rpcpipe.worker.agreement import Verdict
from rpcpipe.worker.messages import Report

log = logging.getLogger("rpcpipe")


class _Done(NamedTuple):
    """A batch that has been executed."""

    plan: StepContext
    ending: Ending
    reports: Mapping[str, Report]
    verdict: Verdict


def _nothing(follower: Course | None) -> None:
    """Do nothing."""


class Step:
    """A training step. ``context_id`` names its distributed-autograd context inside the with-block.

    ``updates_at_once``: the caller will update whatever the batch gives, so workers need not wait to be told; they use
    contexts of their own. ``by_hand``: it is the user's; the pipeline's callbacks are called at the end of its
    block if it counts.

    It is a class and not a generator because Python delivers no Ctrl-C between the return of ``__enter__``
    and the with-block.
    """

    context_id: int

    def __init__(
        self,
        runtime: Runtime,
        number: int,
        wanted: Wanted = NOTHING,
        *,
        updates_at_once: bool = False,
        by_hand: bool = False,
    ) -> None:
        self._runtime, self._tells = runtime, by_hand
        progress = runtime.in_progress
        self._course = Course(number, progress, wanted, updates_at_once)
        # By worker, when an update that did not wait for the driver began and ended.
        self._updates: dict[str, tuple[int, int]] = {}
        self._message = runtime.driver.new_step()
        self._started = time.perf_counter()
        self._result: StepResult | None = None
        self._progress = progress
        self._began = False
        # Set before the update, as rolling back an update that did not happen is harmless, and after it.
        self._updated = self._has_updated = False
        self._overflowed = False
        self._context: AbstractContextManager[int] | None = None
        self._thread = threading.current_thread()  # whose context it is
        self._lost = False
        self._one_way = False  # an update is under way that cannot be taken back
        self._undoes = runtime.settings.undo == "copy"
        self._counted = False
        self._published: dict[str, Future[Any]] = {}
        # What to run again if a worker dies in an update that the driver sends.
        self._given: tuple[Nest, Nest] | None = None
        self._changes: Sequence[Mapping[str, Any]] = ()  # of hyperparameters, as sent for the update

    @property
    def turn(self) -> Turn:
        """The pipeline's."""
        return self._runtime.turn

    def __enter__(self) -> Step:
        try:
            with shield_interrupts():
                self.turn.run("step", self._enter)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def _enter(self) -> None:
        self._runtime.enter(self)
        if not self._course.updates_at_once:
            self._open_context()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        with shield_interrupts():
            self.turn.take("step", self._exit, kind, error)
        if self._tells and self._counted:
            self._tells = False
            self.turn.take("step", tell, self._runtime.callbacks, self.result())

    def _exit(self, kind: type[BaseException] | None, error: BaseException | None) -> None:
        self._runtime.leave(self)
        self._close_context()
        if self._counted:
            return
        # A Ctrl-C may come after the last worker has updated and before the caller can know of the update.
        unknown = isinstance(error, KeyboardInterrupt) or self._course.updates_at_once
        if kind is not None and (unknown or not self._updated):
            updating = self._updated or self._course.updates_at_once
            self._runtime.driver.roll_back(self._message, updating=updating)
        elif self.done and self._updated == self._has_updated:  # not, if the update failed and was rolled back
            self._advance()

    def _open_context(self) -> None:
        self._context, self._thread = self._runtime.cluster.transport.context(), threading.current_thread()
        self.context_id = self._context.__enter__()

    def _close_context(self) -> None:
        if self._context is not None:
            context, self._context = self._context, None
            context.__exit__(None, None, None)

    def _advance(self) -> None:
        """Count the step, which has succeeded, and update the loss scale."""
        self._counted = True
        runtime, result, course = self._runtime, self.result(), self._course
        runtime.history.trained(
            StepRecord(course.number, course.progress, self._changes, self._has_updated, self._given)
        )
        runtime.trained += 1
        runtime.progress = self._progress
        if runtime.scaler is not None and not result.accumulated:
            precision.update_loss_scale(runtime.scaler, finite=not self._overflowed)

    @property
    def done(self) -> bool:
        """Whether a batch has been run."""
        return self._result is not None

    @in_turn
    def forward_backward(self, inputs: NestOfTensors, targets: NestOfTensors) -> float:
        """Run the batch, put the gradients of its mean loss into the context, and return the loss."""
        self._runtime.driver.settle(self._message, self.run(inputs, targets))
        return self.result().loss

    def run(
        self,
        inputs: Nest,
        targets: Nest,
        issued: Issued | None = None,
        meanwhile: Callable[[Course | None], None] = _nothing,
    ) -> dict[str, Future[Any]]:
        """Run the batch like ``forward_backward``; return the replies that say when the gradients are in the context.

        ``issued``: a step of this batch that was issued ahead. ``meanwhile`` runs while the workers compute, with the
        course of the next step if that may be issued now. Raises StateError if a batch has been run in this step
        already.
        """
        if self._began:
            what = "was called in this step already" if self.done else "has failed in this step"
            raise StateError(f"forward_backward {what}; open another step")
        self._check_lost()
        self._check_thread()
        runtime, driver = self._runtime, self._runtime.driver
        if issued is not None and issued.came_true(runtime, self._course):
            cut, self._message = issued.cut, issued.terms.plan.step
        else:
            cut, issued = Cut.of(runtime, inputs, targets), None
        self._began, self._given = True, (inputs, targets) if self._course.updates_at_once else None
        runtime.by_hand = None if self._course.updates_at_once else self._message
        done = self._execute(cut, issued, meanwhile)
        plan, verdict = done.plan, done.verdict
        sound = verdict.sound and not self._progress.spoiled
        if not sound:
            self._leave_out(done)
        factor = 1.0 / plan.scale / (verdict.count or 1.0)
        input_grads = runtime.input_gradients(cut.batch, inputs, done.reports, factor)
        applied = plan.updates and sound
        self._record(done, input_grads, applied=applied, size=cut.batch.size)
        if done.ending.updates or not applied:
            return {}
        if self._context is None:
            self._open_context()
        self._published = driver.publish_gradients(self._message, self.context_id, verdict.gate.factor)
        return self._published

    def _execute(self, cut: Cut, issued: Issued | None, meanwhile: Callable[[Course | None], None]) -> _Done:
        """Execute the batch's actions and, unless that is left to the driver, its update; return what came out."""
        runtime, driver, course, shares = self._runtime, self._runtime.driver, self._course, cut.batch.weights
        plan, ending, program = course.terms(runtime, self._message, cut.batch) if issued is None else issued.terms
        # The next step's forwards need weights that are updated, so not if the driver has yet to send the update.
        may_follow = (ending.updates or not plan.updates) and runtime.loss_is_mean is not None
        follower = course.after(plan.step) if may_follow else None
        then = partial(meanwhile, follower)
        if issued is None:
            self._changes = ending.orders.changes if isinstance(ending, Committing) and ending.orders else ()
            reports = driver.run(program, plan, cut.values, ending, then)
        else:
            orders = course.orders(runtime) if ending.updates else None
            self._changes = () if orders is None else orders.changes
            reports = driver.follow(program, issued.replies, orders, then)
        max_norm = runtime.settings.clip_grad_norm
        verdict = judge(driver, plan, self._progress, reports, shares, max_norm, divided=ending.updates)
        runtime.loss_is_mean = verdict.count is None
        if ending.alone and not runtime.loss_is_mean:
            # The updates took the loss for a mean, as it was in the step before. Now the workers agree.
            driver.roll_back(self._message, updating=True)
            self._message = driver.new_step()
            return self._execute(cut, None, meanwhile)
        return _Done(plan, ending, reports, verdict)

    def _record(self, done: _Done, input_grads: Nest, *, applied: bool, size: Size) -> None:
        """Note what the batch has given: its place in an accumulation, its updates and its figures."""
        runtime, plan, reports, verdict = self._runtime, done.plan, done.reports, done.verdict
        if runtime.tracer is not None:
            runtime.tracer.step(reports, self._course.number)
        self._progress = self._progress.later(self._message, verdict.count, spoiled=verdict.spoiled)
        self._overflowed = any(report.overflowed for report in reports.values())
        if done.ending.updates:
            self._updates = {worker: (report.updated.start, report.updated.end) for worker, report in reports.items()}
        measured = spans(reports, runtime.offsets, self._course.number)
        self._result = StepResult(
            step=self._course.number,
            loss=verdict.loss,
            grad_norm=verdict.gate.grad_norm,
            seconds=time.perf_counter() - self._started,
            peak_in_flight=by_stage(reports, "peak_in_flight"),
            applied=applied,
            timeline=Timeline(measured, workers=len(reports), name=runtime.schedule.name),
            peak_activation_bytes=by_stage(reports, "peak_bytes"),
            recomputed=by_stage(reports, "recomputed", sum),
            accumulated=self._progress.done,
            samples=size.samples,
            tokens=size.tokens,
            loss_scale=plan.scale,
            metrics=mean_metrics(reports),
            outputs=merged_outputs(reports),
            input_grads=input_grads,
        )
        runtime.note(self._result.timeline)

    def _leave_out(self, done: _Done) -> None:
        """Let no weight change, because a loss or a gradient is not finite, or was not earlier in an accumulation.

        With ``nonfinite="stop"``, raises StageError. The overflow of a finite loss under a loss scale raises nothing,
        because a smaller scale mends it.
        """
        driver, verdict, finite = self._runtime.driver, done.verdict, math.isfinite(done.verdict.loss)
        if self._runtime.settings.nonfinite == "stop" and not verdict.sound and (done.plan.scale == 1.0 or not finite):
            refuse_nonfinite(done.reports, len(self._runtime.stages) - 1)
        if not verdict.sound and not finite:
            # NaN would stay in running statistics for ever.
            driver.roll_back(self._message, updating=done.ending.alone)
        elif done.ending.alone:
            driver.take_update_back(self._message)
        norm = verdict.gate.grad_norm
        log.warning(
            "step %d: loss %s, norm of the gradient %s; no weight changes", self._course.number, verdict.loss, norm
        )

    @in_turn
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
        self._check_lost()
        self._check_thread()
        if not self.result().applied:
            return
        self._updated = True
        times = self._updates or self._update_healed()
        self._has_updated = True
        if self._runtime.tracer is not None:
            self._runtime.tracer.update(times, self._course.number)
        if not self._undoes:  # whatever comes now, the step is done
            self._runtime.by_hand = None
            self._advance()

    def _update_healed(self) -> Mapping[str, tuple[int, int]]:
        if self._given is None:
            return self._update()
        # Not the whole step again, because hooks of the optimizer run around this, once.
        return healed(self._runtime.cluster, self._runtime.ready, self._update)

    def _update(self) -> Mapping[str, tuple[int, int]]:
        """Send the update, after the batch has been run again if a worker has died since; return its times."""
        runtime = self._runtime
        if self._given is not None and self._lost:
            self._lost = self._began = False
            # The steps that have accumulated may have been done again, under other numbers.
            self._message, self._progress = runtime.driver.new_step(), runtime.in_progress
            self._course = self._course._replace(progress=self._progress)
            self._close_context()
            self.run(*self._given)
        self._check_lost()
        self._changes = runtime.optimizer.changes()
        send = partial(
            runtime.driver.update_weights,
            self._message, self.context_id, self._changes, runtime.program.after_update(), undoes=self._undoes,
        )  # fmt: skip
        if self._undoes:
            return send()
        runtime.driver.settle(self._message, self._published)
        self._one_way, times = True, dict[str, tuple[int, int]]()
        try:
            with one_way(runtime, self._message):
                times = send()
            self._lost = False
        finally:
            self._one_way = False
        return times

    def lose(self) -> None:
        """Note that a worker has been replaced: unless the weights are updated, nothing is left of the step."""
        if not self._has_updated:
            self._lost = True
        if not self._has_updated and not self._one_way:
            self._runtime.driver.roll_back(self._message, updating=True)

    def _check_thread(self) -> None:
        """Raise StateError in another thread: a distributed-autograd context is its thread's."""
        require(
            self._context is None or self._thread is threading.current_thread(),
            f"thread {self._thread.name!r} entered this step and thread {threading.current_thread().name!r} runs it:"
            " its distributed-autograd context is the first one's; run all of a step in one thread",
            error=StateError,
        )

    def _check_lost(self) -> None:
        if self._lost:
            raise WorkerLost(
                "a worker has died and been replaced since this step began, and its gradients are gone: leave the"
                " with-block and open another step"
            )

    def result(self) -> StepResult:
        """Return the figures so far. Raises StateError before ``forward_backward``."""
        if self._result is None:
            raise StateError("call s.forward_backward(inputs, targets) first")
        return dataclasses.replace(
            self._result, seconds=time.perf_counter() - self._started, lr=self._runtime.optimizer.lr
        )


def train_once(
    step: Step,
    inputs: Nest,
    targets: Nest,
    issued: Issued | None = None,
    meanwhile: Callable[[Course | None], None] = _nothing,
) -> StepResult:
    """Run ``step`` on a batch to its update, and return the result.

    ``issued`` and ``meanwhile`` are as for ``Step.run``.
    """
    with shield_interrupts(), step:
        # Not forward_backward, which waits until the gradients are in the context: one more round trip.
        step.run(inputs, targets, issued, meanwhile)
        step.optimize()
        shield_interrupts.check()  # before this line the step can be rolled back; after it the step is done
        return step.result()
