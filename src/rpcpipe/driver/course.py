"""How a training step runs, apart from its batch: what follows from the settings and from the steps before.

A step that runs ahead is issued with what follows if the step before succeeds, and goes on if that came true.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from rpcpipe.driver.ending import REPORT, Committing, Ending
from rpcpipe.driver.feeding import cut_pair
from rpcpipe.driver.inference import Wanted
from rpcpipe.driver.program import Program
from rpcpipe.driver.runtime import Runtime
from rpcpipe.model.batch import Batch
from rpcpipe.model.microbatch import Nest
from rpcpipe.stage.context import StepContext
from rpcpipe.stage.progress import Progress
from rpcpipe.worker.agreement import Agreement
from rpcpipe.worker.messages import Orders, Port


class Course(NamedTuple):
    """The ``number`` of a step, the ``progress`` of the accumulation before it, and what it reports.

    ``updates_at_once``: the caller will update whatever the batch gives, so workers need not wait to be told.
    """

    number: int
    progress: Progress
    wanted: Wanted
    updates_at_once: bool

    def plan(self, runtime: Runtime, message: int, weights: Sequence[float]) -> StepContext:
        """Return the step's context; ``weights``: each micro-batch's share of the batch."""
        progress = self.progress
        return StepContext(
            message,
            self.number,
            True,
            tuple(weight / progress.calls for weight in weights),
            trace=runtime.tracer is not None,
            scale=1.0 if runtime.scaler is None else runtime.scaler.get_scale(),
            accumulates_on=progress.after,
            updates=progress.is_last,
            measures=self.wanted.measures,
            keep_outputs=self.wanted.outputs,
        )

    def ending(self, runtime: Runtime, plan: StepContext) -> Ending:
        """Return how the step ends; workers update by themselves unless the user may still change the update.

        Nor where an update cannot be taken back: then nobody updates before the driver knows that all can.
        """
        waits = not self.updates_at_once or self.progress.spoiled or runtime.optimizer.may_be_changed
        waits = waits or runtime.settings.undo == "off"
        if waits or not plan.updates:
            return REPORT
        orders = None if plan.ahead else self.orders(runtime)
        return Committing(self._agreement(runtime), runtime.program.after_update(), orders)

    def orders(self, runtime: Runtime) -> Orders:
        """Return what the update needs as soon as the step before is settled."""
        return Orders(runtime.optimizer.changes(), self.progress)

    def _agreement(self, runtime: Runtime) -> Agreement | None:
        """Return how the workers agree, None if an update needs nothing of other workers.

        That is: no norm, no scale that may overflow, no exchange of gradients, and no count; that the loss is a mean
        is known from the step before.
        """
        max_norm, exchanging = runtime.settings.clip_grad_norm, runtime.program.exchanges
        if runtime.loss_is_mean and max_norm is None and runtime.scaler is None and not exchanging:
            return None
        names, stages = runtime.names, runtime.schedule.placement
        tellers = names if exchanging else runtime.layout.replicas_of(stages[-1])
        return Agreement(tuple(names), tuple(tellers), max_norm)

    def terms(self, runtime: Runtime, message: int, batch: Batch, *, ahead: bool = False) -> Terms:
        """Return how the step runs as ``message`` on ``batch``, as things are now."""
        plan = self.plan(runtime, message, batch.weights)._replace(ahead=ahead)
        return Terms(plan, self.ending(runtime, plan), runtime.program.train(batch.counts, updates=plan.updates))

    def after(self, message: int) -> Course:
        """Return the course of the next step, if this one succeeds as ``message``; its batch's count is not known."""
        progress = self.progress
        later = (
            Progress(progress.calls) if progress.is_last else progress._replace(done=progress.done + 1, after=message)
        )
        return self._replace(number=self.number + 1, progress=later)


class Terms(NamedTuple):
    """How a step is issued: with what context, what ending and whose calls."""

    plan: StepContext
    ending: Ending
    program: Program


class Cut(NamedTuple):
    """A batch in micro-batches, and what workers get of it, by port."""

    batch: Batch
    values: Mapping[Port, Any]

    @classmethod
    def of(cls, runtime: Runtime, inputs: Nest, targets: Nest) -> Cut:
        """Cut a batch; raises ArgumentError for what cannot be cut or sent."""
        batch, target_parts = cut_pair(runtime, inputs, targets)
        return cls(batch, runtime.program.given(batch.parts, target_parts))


class Issued(NamedTuple):
    """A step that runs ahead: how it was issued, and the workers' replies."""

    cut: Cut
    terms: Terms
    replies: Mapping[str, Future[Any]]

    @classmethod
    def ahead(cls, runtime: Runtime, course: Course, cut: Cut) -> Issued:
        """Issue a step of ``cut`` that takes ``course``, after the one under way."""
        terms = course.terms(runtime, runtime.driver.new_step(), cut.batch, ahead=True)
        return cls(cut, terms, runtime.driver.run_ahead(terms.program, terms.plan, cut.values, terms.ending))

    def came_true(self, runtime: Runtime, course: Course) -> bool:
        """Return whether the step runs still, and as it would be issued now, where it takes ``course``."""
        step = self.terms.plan.step
        return runtime.driver.ahead == step and course.terms(runtime, step, self.cut.batch, ahead=True) == self.terms
