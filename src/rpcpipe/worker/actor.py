"""The remote actor: executes one pipeline's operations on the stages of one worker.

The executor's compute thread calls ``execute`` with one operation at a time, in the driver's order.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rpcpipe.errors import ModelError, NonFiniteError, require
from rpcpipe.model.microbatch import Nest, Packed, pack
from rpcpipe.model.wiring import DRIVER
from rpcpipe.model.wiring import link as link_to
from rpcpipe.schedules import Action
from rpcpipe.stage import gradients
from rpcpipe.stage.context import MicroBatch, StepContext
from rpcpipe.stage.rollback import StepStarts
from rpcpipe.stage.stage import Stage
from rpcpipe.worker.gradient_exchange import Tensors, group_of, statistics_from
from rpcpipe.worker.kept_state import CHANGING, KeptState
from rpcpipe.worker.messages import Bucket, Port, Report, Route, StageInfo, Update, Updated
from rpcpipe.worker.operations import (
    AddStatistics,
    BeginCall,
    BeginStep,
    EndStream,
    GatherSums,
    GatherWeights,
    GiveStatistics,
    Operation,
    Reduce,
    ReduceScatter,
    ReportStep,
    ResumeStream,
    RollBackStep,
    RunAction,
    TakeBuffers,
    UpdateOperation,
)
from rpcpipe.worker.reader import Reader
from rpcpipe.worker.revival import Restored
from rpcpipe.worker.stage_set import StageSet
from rpcpipe.worker.stage_state import StageState
from rpcpipe.worker.stream_keeper import StreamKeeper
from rpcpipe.worker.update import Ledger, Updater
from rpcpipe.worker.worker_operations import WorkerOperation

# Sends a value: worker, step, port, value.
SendValue = Callable[[str, int, Port, Any], None]


class Actor:
    """Executes operations on the stages ``held`` of one pipeline on worker ``name``."""

    def __init__(
        self, name: str, held: StageSet, *, send: SendValue, ledger: Ledger, restored: Restored | None = None
    ) -> None:
        self.held = held
        self._state = StageState(self.held, None if restored is None else restored.fresh_loss)
        self.name = name
        self._send = send
        self.reader = Reader(held)
        self._updater = Updater(name, self.held, ledger, self._push)
        self._starts = StepStarts() if restored is None else restored.starts
        self._refusal: ModelError | None = None  # of what could not be rolled back, for the next step
        self._ordered = -1  # the newest step for which orders have come; a handler sets it
        self._plan = StepContext(-1, 0, False, ()) if restored is None else restored.plan
        self._report = Report(worker=name)
        self._arrivals: deque[tuple[int, Port, int]] = deque()  # handlers append
        self._kept = self._keep() if restored is None else restored.kept
        self.stream = StreamKeeper(self.held, self._kept, None if restored is None else restored.snapshots)

    def _keep(self) -> KeptState | None:
        if not self.held.spec.keep or any(stage.device.type != "cpu" for stage in self.held.stages.values()):
            return None
        return KeptState.of(self.held, self._starts, self._state.fresh_loss)

    def idle_work(self, action: Action | None = None) -> bool:
        """Do one piece of work while ``action`` waits for its input; return False if there is none.

        The recomputation of a backward overlaps with the wait for its gradient (Kim et al., "torchgpipe",
        section 3.2, early recomputation).
        """
        self.held.spec.settings.resume()
        if action is not None and action.kind in "BI" and self.held.stages[action.stage].prepare(action.chunk):
            return True
        if self.held.optimizer is None:
            return False
        if self._ordered == self._plan.step:
            self.held.optimizer.undo.begin(self._plan.step)
        return self.held.optimizer.undo.refresh_one()

    def ordered(self, step: int) -> None:
        """Note that orders for ``step`` have come: the step before is settled. Called by a handler's thread."""
        self._ordered = step

    def arrived(self, step: int, port: Port) -> None:
        """Record when a value for ``port`` arrived from another worker. Called by a handler's thread."""
        self._arrivals.append((step, port, time.monotonic_ns()))

    def describe(self) -> dict[int, StageInfo]:
        """Return the description of every stage of this worker, by stage."""
        return self.held.describe()

    def write_image(self, descriptor: int) -> None:
        """Write what the worker keeps of its stages, between two steps, into a file.

        Raises ModelError if it does not keep all.
        """
        require(self._kept is not None, "nothing of this worker is kept", error=ModelError)
        assert self._kept is not None
        self._kept.write_image(descriptor)

    def module(self, stage: int) -> nn.Module:
        """Return the module of ``stage``, to run it under the pipeline's settings of torch."""
        self.held.spec.settings.resume()
        return self.held.module(stage)

    def execute(self, operation: Operation, inputs: Mapping[str, Any]) -> Any:
        """Execute ``operation`` and return its result. ``inputs``: the values that the task awaited, by slot."""
        self.held.spec.settings.resume()
        if self.stream.has_ended and not isinstance(operation, (ResumeStream, EndStream)):
            self.stream.drop()
        if self._kept is None or not isinstance(operation, CHANGING):
            return self._execute(operation, inputs)
        with self._kept.around(operation):
            return self._execute(operation, inputs)

    def _execute(self, operation: Operation, inputs: Mapping[str, Any]) -> Any:
        match operation:
            case RunAction(route, context):
                return self._run_action(route, context, inputs)
            case BeginStep(plan):
                self._begin_step(plan)
            case ReduceScatter(group):
                self._reduce_scatter(group)
            case Reduce(group, bucket, spread):
                self._reduce(group, bucket, spread, inputs)
            case GatherSums(group, bucket):
                self.held.exchanges[group].take_sums(bucket, inputs["sums"])
            case GatherWeights(group, bucket):
                self.held.exchanges[group].take_weights(bucket, inputs["weights"])
            case GiveStatistics(stage):
                self._give_statistics(stage)
            case AddStatistics(stage):
                self._add_statistics(stage, inputs)
            case TakeBuffers(stage):
                self._take_buffers(stage, inputs["buffers"])
            case ReportStep():
                return self._report_step()
            case RollBackStep():
                self._roll_back(operation)
            case ResumeStream(plan, stream, updates):
                self._begin_step(plan, stream, updates)
            case EndStream(stream, updates):
                self.stream.end(stream, updates)
                self._clear()
            case BeginCall(number):
                self._begin_call(number)
            case _:
                if isinstance(operation, UpdateOperation):
                    return self._updater.execute(operation, self._plan, self._report, inputs)
                assert not isinstance(operation, WorkerOperation), "the executor runs this operation"
                return self._state.execute(operation)
        return None

    # --- operations of a step, in the order of their execution ---

    def _begin_step(self, plan: StepContext, stream: int | None = None, updates: int = 0) -> None:
        """Start ``plan.step``. Unless it runs ahead, the step before is settled on all workers.

        ``stream``: the step is that stream, which goes on after its first ``updates``.
        """
        self._clear()
        self._plan = plan
        if self._refusal is not None:
            refusal, self._refusal = self._refusal, None
            raise refusal
        if plan.policy is not None:
            self.stream.open(plan.policy, plan.step if stream is None else stream, updates)
        elif plan.training:
            for stage in self.held.stages.values():
                stage.leaving.forget()
            if plan.ahead:
                self._starts.take_ahead(plan.step, self.held.buffered, self.held.parts)
            else:
                self._starts.take(plan.step, self.held.buffered)
            self.held.accumulated.resume(plan.accumulates_on, self.held.parameters, ahead=plan.ahead)
            # The update before a step that runs ahead may have to be taken back until orders come.
            if self.held.optimizer is not None and not plan.ahead:
                self.held.optimizer.undo.cover(self.held.optimizer.owned)
                self.held.optimizer.undo.begin(plan.step, after=plan.accumulates_on)
        if self._kept is not None:
            self._kept.begin(plan)

    def _run_action(self, route: Route, context: MicroBatch | Update | None, values: Mapping[str, Any]) -> Any:
        """Execute one action of the schedule and send its results to other stages; an update returns a Report.

        ``values``: by link, the inputs or gradients that the route awaits.
        """
        kind, index, chunk = route.action
        stage, plan = self.held.stages[index], self._plan
        start = time.monotonic_ns()
        results: Mapping[str, Any] = {}
        if isinstance(context, Update):
            return self._update(stage, chunk, context, start)
        micro_batch = context or stage.micro_batches.get(chunk) or plan.micro_batch(chunk)
        if kind == "F":
            values = self.reader.filled(values)
            parcels = {link: parcel for link, parcel in values.items() if link != "target"}
            if plan.policy is not None:
                self.stream.before_forward(micro_batch)
            results = stage.forward(plan, micro_batch, chunk, parcels, values.get("target"))
        elif kind == "B" and plan.policy is not None:
            results = self.stream.backwards[index].run(plan, chunk, values)
        elif kind == "B":
            results = stage.backward(chunk, values)
        elif kind == "I":
            results = stage.backward_input(chunk, values)
        else:
            stage.backward_weight(chunk)
        self._report.spans.append((kind, index, chunk, start, time.monotonic_ns(), stage.version(micro_batch)))
        for link, worker, port in route.sends:
            if plan.trace and worker != self.name:
                self._report.sends.append((route.action, port, time.monotonic_ns()))
            self._send(worker, plan.step, port, results[link])
        if kind in "BI" and plan.policy is None and (grads := results.get(link_to(index, DRIVER))):
            self._report.input_grads[index, chunk] = grads
        return None

    def _reduce_scatter(self, group: str) -> None:
        """Push to every other member of ``group`` the gradients that this member sums."""
        self._push(self.held.exchanges[group].scatter())

    def _reduce(self, group: str, bucket: int, spread: bool, parts: Mapping[str, Tensors]) -> None:
        """Sum the members' gradients ``parts`` of ``bucket`` with this worker's; ``spread``: push the sums."""
        exchange = self.held.exchanges[group]
        exchange.reduce(bucket, parts)
        if spread:
            self._push(exchange.sums(bucket))

    def _give_statistics(self, stage: int) -> None:
        """Push to the first replica what this replica's micro-batches add to running statistics."""
        first, *_ = self.held.spec.peers.workers
        port = Port(Bucket(group_of(stage), 0), statistics_from(self.name))
        pending = [tensor for norm in self.held.stages[stage].norms for tensor in norm.give()]
        self._send(first, self._plan.step, port, [tensor.cpu() for tensor in pending])

    def _add_statistics(self, index: int, parts: Mapping[str, Sequence[torch.Tensor]]) -> None:
        """Update running statistics from the micro-batches of all replicas; push the buffers to the other replicas."""
        stage, others = self.held.stages[index], self.held.spec.peers.workers[1:]
        for worker in others:
            tensors = iter(parts[statistics_from(worker)])
            for norm in stage.norms:
                norm.merge(*(next(tensors).to(stage.device) for _ in range(3)))
        for norm in stage.norms:
            norm.commit()
        buffers = [buffer.cpu() for buffer in stage.module.buffers()]
        self._push((worker, Port(Bucket(group_of(index), 0), "buffers"), buffers) for worker in others)

    @torch.no_grad()
    def _take_buffers(self, stage: int, values: Sequence[torch.Tensor]) -> None:
        """Set the stage's buffers to the first replica's ``values``."""
        for buffer, value in zip(self.held.stages[stage].module.buffers(), values, strict=True):
            buffer.copy_(value)

    def _push(self, pushes: Iterable[tuple[str, Port, Any]], step: int | None = None) -> None:
        for worker, port, value in pushes:
            self._send(worker, self._plan.step if step is None else step, port, value)

    def _report_step(self) -> Report:
        """Return the worker's report of the step, all of whose actions on this worker are done."""
        report = self._report
        self._add_arrivals(report)
        self._state.check_loss()
        self._starts.check(self._plan.step)
        for index, stage in self.held.stages.items():
            report.losses.update(stage.loss_values())
            report.outputs.update(_packed(stage.outputs))
            report.metrics.update(stage.measured)
            report.peak_in_flight[index] = stage.peak_in_flight
            report.peak_bytes[index], report.recomputed[index] = stage.peak_bytes, stage.segments.recomputed
            if self._plan.training:
                for norm in stage.norms:
                    norm.commit()
                if self._plan.updates:
                    gradients.unscale(stage.parameters, self._plan.scale)
                self._updater.add_norms(report, stage)
            stage.outputs = {}
        report.overflowed = not report.gradient_norms.finite
        if self._plan.training and not self._plan.updates:
            self.held.accumulated.keep(self._plan.step, self.held.parameters)
        return report

    def _add_arrivals(self, report: Report) -> None:
        """Move the arrivals of the step to ``report``; those of a stream, since its last update."""
        later = []  # of a step that runs ahead on other workers
        while self._arrivals:
            step, port, arrived = arrival = self._arrivals.popleft()
            if step > self._plan.step:
                later.append(arrival)
            elif self._plan.trace and step == self._plan.step:
                report.arrivals.append((port, arrived))
        self._arrivals.extendleft(reversed(later))

    def _roll_back(self, order: RollBackStep) -> None:
        """Roll a step back, unless it has not begun on this worker."""
        if order.ahead:
            try:
                self._starts.check(order.step)
            except ModelError as error:
                self._refusal = error
        begun = self._starts.restore(order.step, ahead=order.ahead)
        if begun and order.updating and self.held.optimizer is not None:
            self.held.optimizer.undo.take_back(order.step)

    def _begin_call(self, number: int) -> None:
        """Copy what a call may change; no step is open."""
        self._starts.take(number, self.held.buffered)
        if self.held.optimizer is not None:
            self.held.optimizer.undo.cover(self.held.optimizer.parameters)  # a call may change all
            self.held.optimizer.undo.begin(number)
            self.held.optimizer.undo.refresh()
        if self._kept is not None:
            self._kept.begin(StepContext(number, 0, True, ()))

    # --- operations of a stream ---

    def _update(self, stage: Stage, chunk: int, update: Update, start: int) -> Report:
        """Apply the gradients of ``update.group`` through a new distributed-autograd context; return the report.

        Raises NonFiniteError for a gradient that is not finite although the loss is.
        """
        versions, parameters = stage.versions, stage.parameters
        assert versions is not None
        report, self._report = self._report, Report(worker=self.name)
        self._updater.add_norms(report, stage)
        norms = list(report.norms[stage.index].values())
        report.skipped = self.stream.backwards[stage.index].take_skipped(update.group)
        if report.skipped:
            versions.before_update(update.group, skipped=True)
            for parameter in parameters:
                parameter.grad = None
        elif not all(map(math.isfinite, norms)):
            raise NonFiniteError(
                f"the loss is finite and a gradient of stage {stage.index} is not; later stages have applied theirs"
            )
        elif self.held.optimizer is not None:
            dtype, total = report.norm_dtype, gradients.total_norm(norms, report.norm_dtype)
            factor = 1.0 if update.clip is None else gradients.clip_factor(total, update.clip, dtype)
            versions.before_update(update.group)
            with self._updater.ledger.context() as context_id:
                self._updater.publish(context_id, factor)
                self.held.optimizer.apply(self._updater.ledger.get_gradients(context_id), update.changes)
            report.updated = Updated(changed=self.held.optimizer.changed)
        versions.after_update(update.group)
        self.stream.updated(stage, update.committed)
        report.losses, report.peak_in_flight[stage.index] = stage.take_losses(), stage.peak_in_flight
        done = report.losses.keys()
        report.metrics = {chunk: stage.measured.pop(chunk) for chunk in done & stage.measured.keys()}
        report.outputs = _packed({chunk: stage.outputs.pop(chunk) for chunk in done & stage.outputs.keys()})
        report.peak_bytes[stage.index], report.recomputed[stage.index] = stage.peak_bytes, stage.segments.recomputed
        report.versions[stage.index] = versions.peak, versions.bytes
        report.spans.append(("U", stage.index, chunk, start, time.monotonic_ns(), versions.newest))
        self._add_arrivals(report)
        return report

    def reset(self, step: int) -> None:
        """Forget the failed ``step``, unless the next step has begun (the two messages may cross)."""
        if self._plan.step <= step:
            self._clear()

    def _clear(self) -> None:
        self._report = Report(worker=self.name)
        # Values of the step that begins may have arrived already; only arrivals up to the last step are dropped.
        while self._arrivals and self._arrivals[0][0] <= self._plan.step:
            self._arrivals.popleft()
        for stage in self.held.stages.values():
            stage.reset()


def _packed(outputs: Mapping[int, Nest]) -> dict[int, Packed]:
    """Return outputs by micro-batch as they travel to the driver."""
    return {chunk: pack(output) for chunk, output in outputs.items()}
