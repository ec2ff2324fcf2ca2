"""The remote actor: one pipeline's stages on one worker, and what they do in a step.

The executor's compute thread calls ``execute`` with one operation at a time, in the driver's order.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from rpcpipe.model.microbatch import pack
from rpcpipe.model.wiring import DRIVER
from rpcpipe.model.wiring import link as link_to
from rpcpipe.schedules import Action
from rpcpipe.stage import gradients
from rpcpipe.stage.context import MicroBatch, StepContext
from rpcpipe.stage.rollback import Buffers
from rpcpipe.stage.stage import Stage
from rpcpipe.stage.stream import StreamBackward
from rpcpipe.stage.stream_rollback import Snapshots
from rpcpipe.stage.weight_stash import Versions
from rpcpipe.worker.gradient_exchange import Push, Tensors, group_of, statistics_from
from rpcpipe.worker.messages import Bucket, Port, Report, Route, StageInfo, Update
from rpcpipe.worker.operations import (
    AddStatistics,
    BeginStep,
    CallFunction,
    CreateActor,
    DropActor,
    EndStream,
    ForgetStep,
    ForwardByHand,
    GatherSums,
    GatherWeights,
    GiveStatistics,
    LastUpdate,
    NormalizeGradients,
    Operation,
    PublishGradients,
    Reduce,
    ReduceScatter,
    ReportStep,
    RollBackStep,
    RunAction,
    TakeBuffers,
    UpdateWeights,
)
from rpcpipe.worker.stage_set import ActorSpec, StageSet


class Ledger(Protocol):
    """Where gradients are filed: the step's distributed-autograd context."""

    def context(self) -> AbstractContextManager[int]: ...

    def accumulate(self, context_id: int, root: torch.Tensor) -> None: ...

    def get_gradients(self, context_id: int) -> Mapping[torch.Tensor, torch.Tensor]: ...


Send = Callable[[str, int, Port, Any], None]


class Actor:
    """Stages of one pipeline on worker ``name``, at work. ``held``: what it works on."""

    def __init__(self, name: str, spec: ActorSpec, *, device: torch.device, send: Send, ledger: Ledger) -> None:
        self.held = StageSet(spec, device)
        self.name = name
        self._send = send
        self._ledger = ledger
        self._snapshots: Snapshots | None = None
        self._stream_backwards: dict[int, StreamBackward] = {}
        self._buffers = Buffers()
        self._plan = StepContext(-1, 0, False, ())
        self._report = Report(name)
        self._updated = 0, 0
        self._arrivals: deque[tuple[int, Port, int]] = deque()  # handlers append

    def idle_work(self, action: Action | None = None) -> bool:
        """Something useful to do while waiting for ``action``'s input; False if there is nothing.

        A backward's recomputation overlaps with waiting for its gradient (Kim et al., "torchgpipe",
        section 3.2, early recomputation).
        """
        if action is not None and action.kind in "BI" and self.held.stages[action.stage].prepare(action.chunk):
            return True
        return self.held.optimizer is not None and self.held.optimizer.undo.refresh_one()

    def arrived(self, step: int, port: Port) -> None:
        """A value for ``port`` came from another worker; called by a handler's thread."""
        self._arrivals.append((step, port, time.monotonic_ns()))

    def describe(self) -> dict[int, StageInfo]:
        """Describe the stages here, by number."""
        return self.held.describe()

    def module(self, stage: int) -> nn.Module:
        """Return a stage's module."""
        return self.held.module(stage)

    def execute(self, operation: Operation, inputs: Mapping[str, Any]) -> Any:
        """Do what the driver asks for; ``inputs``: the values that the task awaited, by slot."""
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
            case GiveStatistics(number):
                self._give_statistics(number)
            case AddStatistics(number):
                self._add_statistics(number, inputs)
            case TakeBuffers(number):
                self._take_buffers(number, inputs["buffers"])
            case ReportStep():
                return self._report_step()
            case NormalizeGradients(count):
                return self._normalize_gradients(count)
            case PublishGradients(context_id, factor):
                self._publish_gradients(context_id, factor)
            case UpdateWeights(context_id, changes):
                return self._update_weights(context_id, changes)
            case LastUpdate():
                return self._updated
            case RollBackStep(step, updating):
                self._roll_back(step, updating)
            case EndStream(updates):
                self._end_stream(updates)
            case CreateActor() | CallFunction() | ForwardByHand() | ForgetStep() | DropActor():
                raise AssertionError("the worker's, not a pipeline's")
            case _:
                return self.held.execute(operation)
        return None

    # --- operations of a step, in the order in which they come ---

    def _begin_step(self, plan: StepContext) -> None:
        """Start ``plan.step``. That it starts means that the step before is settled everywhere."""
        self._clear()
        self._plan = plan
        if plan.policy is not None:
            self._open_stream(plan.policy)
        elif plan.training:
            for stage in self.held.stages.values():
                stage.leaving.forget()
            self._buffers.take(stage.module for stage in self.held.stages.values())
            self.held.accumulated.resume(plan.accumulates_on, self.held.parameters)
            if plan.accumulates_on is None and self.held.optimizer is not None:  # since then no weight has changed
                self.held.optimizer.undo.invalidate()

    def _run_action(self, route: Route, context: MicroBatch | Update | None, values: Mapping[str, Any]) -> Any:
        """Execute one action of the schedule and send its results on; an update returns a Report.

        ``values`` came by the links that the route awaits.
        """
        kind, number, chunk = route.action
        stage, plan = self.held.stages[number], self._plan
        start = time.monotonic_ns()
        results: Mapping[str, Any] = {}
        if isinstance(context, Update):
            return self._update(stage, chunk, context, start)
        micro_batch = context or stage.micro_batches.get(chunk) or plan.micro_batch(chunk)
        if kind == "F":
            parcels = {link: parcel for link, parcel in values.items() if link != "target"}
            results = stage.forward(plan, micro_batch, chunk, parcels, values.get("target"))
        elif kind == "B" and plan.policy is not None:
            results = self._stream_backwards[number].run(plan, chunk, values)
        elif kind == "B":
            results = stage.backward(chunk, values)
        elif kind == "I":
            results = stage.backward_input(chunk, values)
        else:
            stage.backward_weight(chunk)
        self._report.spans.append((kind, number, chunk, start, time.monotonic_ns(), stage.version(micro_batch)))
        for link, worker, port in route.sends:
            if plan.trace and worker != self.name:
                self._report.sends.append((route.action, port, time.monotonic_ns()))
            self._send(worker, plan.step, port, results[link])
        if kind in "BI" and plan.policy is None and (grads := results.get(link_to(number, DRIVER))):
            self._report.input_grads[number, chunk] = grads
        return None

    def _reduce_scatter(self, group: str) -> None:
        """Push the gradients that others sum to them."""
        self._push(self.held.exchanges[group].scatter())

    def _reduce(self, group: str, bucket: int, spread: bool, parts: Mapping[str, Tensors]) -> None:
        """Sum what was pushed and what is here; ``spread``: push the sums."""
        exchange = self.held.exchanges[group]
        exchange.reduce(bucket, parts)
        if spread:
            self._push(exchange.sums(bucket))

    def _give_statistics(self, number: int) -> None:
        """Push what the micro-batches here add to running statistics to the first replica."""
        first, *_ = self.held.spec.peers.workers
        port = Port(Bucket(group_of(number), 0), statistics_from(self.name))
        pending = [tensor for norm in self.held.stages[number].norms for tensor in norm.give()]
        self._send(first, self._plan.step, port, [tensor.cpu() for tensor in pending])

    def _add_statistics(self, number: int, parts: Mapping[str, Sequence[torch.Tensor]]) -> None:
        """Move the running statistics by what passed in all replicas, and push the buffers to the others."""
        stage, others = self.held.stages[number], self.held.spec.peers.workers[1:]
        for worker in others:
            tensors = iter(parts[statistics_from(worker)])
            for norm in stage.norms:
                norm.merge(*(next(tensors).to(stage.device) for _ in range(3)))
        for norm in stage.norms:
            norm.commit()
        buffers = [buffer.cpu() for buffer in stage.module.buffers()]
        self._push((worker, Port(Bucket(group_of(number), 0), "buffers"), buffers) for worker in others)

    @torch.no_grad()
    def _take_buffers(self, number: int, buffers: Sequence[torch.Tensor]) -> None:
        """Take over the first replica's."""
        for mine, value in zip(self.held.stages[number].module.buffers(), buffers, strict=True):
            mine.copy_(value)

    def _push(self, pushes: Iterable[Push]) -> None:
        for worker, port, value in pushes:
            self._send(worker, self._plan.step, port, value)

    def _report_step(self) -> Report:
        """All actions here are done: the worker's account of the step."""
        report = self._report
        self._add_arrivals(report)
        for number, stage in self.held.stages.items():
            report.losses.update(stage.loss_values())
            report.outputs.update({chunk: pack(output) for chunk, output in stage.outputs.items()})
            report.metrics.update(stage.measured)
            report.peak_in_flight[number] = stage.peak_in_flight
            report.peak_bytes[number], report.recomputed[number] = stage.peak_bytes, stage.segments.recomputed
            if self._plan.training:
                for norm in stage.norms:
                    norm.commit()
                if self._plan.updates:
                    gradients.unscale(stage.parameters, self._plan.scale)
                report.norms[number] = self._norms(stage)
            stage.outputs = {}
        if self._plan.training and not self._plan.updates:
            self.held.accumulated.keep(self._plan.step, self.held.parameters)
        return report

    def _norms(self, stage: Stage) -> dict[int, float]:
        """Of the gradients that are summed here, by the parameter's place in the stage."""
        elsewhere = self.held.owned_elsewhere
        mine = {
            at: parameter
            for at, parameter in enumerate(stage.parameters)
            if parameter.grad is not None and parameter not in elsewhere
        }
        return dict(zip(mine, gradients.norms(list(mine.values())), strict=True))

    def _add_arrivals(self, report: Report) -> None:
        """Those of the step; of a stream, since its last update."""
        while self._arrivals and self._arrivals[0][0] <= self._plan.step:
            step, port, at = self._arrivals.popleft()
            if self._plan.trace and step == self._plan.step:
                report.arrivals.append((port, at))

    def _normalize_gradients(self, count: float) -> dict[int, dict[int, float]]:
        """Turn the gradients of sums into those of means over ``count``; their norms, by stage."""
        gradients.divide(self.held.parameters, count)
        return {number: self._norms(stage) for number, stage in self.held.stages.items()}

    def _publish_gradients(self, context_id: int, factor: float) -> None:
        """File the gradients, times ``factor`` (clipping), in the step's distributed-autograd context."""
        parameters = self.held.parameters
        if factor != 1.0:
            gradients.scale(parameters, factor)
        root = gradients.take(parameters)
        if root is not None:
            self._ledger.accumulate(context_id, root)

    def _update_weights(self, context_id: int, changes: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
        """Apply the context's gradients; when that began and ended, in nanoseconds."""
        start = time.monotonic_ns()
        if self.held.optimizer is not None:
            self.held.optimizer.step(self._ledger.get_gradients(context_id), changes)
        self._updated = start, time.monotonic_ns()
        if self.held.spec.peers.shard:
            for exchange in self.held.exchanges.values():
                self._push(exchange.weights())
        return self._updated

    def _roll_back(self, step: int, updating: bool) -> None:
        """Take ``step`` back, which may not have begun here; ``updating``: its update too."""
        if self._plan.step != step or not self._plan.training:
            return
        self._buffers.restore()
        if updating and self.held.optimizer is not None:
            self.held.optimizer.undo.restore()

    # --- of a stream ---

    def _open_stream(self, policy: str) -> None:
        for number, stage in self.held.stages.items():
            stage.versions = Versions(policy, number, self.held.last_stage + 1, stage.module)
            self._stream_backwards[number] = StreamBackward(stage)
        self._snapshots = Snapshots(self.held.optimizer) if self.held.optimizer is not None else None

    def _update(self, stage: Stage, chunk: int, update: Update, start: int) -> Report:
        """Apply the group's gradients from a distributed-autograd context of its own."""
        versions, parameters = stage.versions, stage.parameters
        assert versions is not None
        report, self._report = self._report, Report(self.name)
        report.norms[stage.index] = self._norms(stage)
        norms = list(report.norms[stage.index].values())
        report.skipped = self._stream_backwards[stage.index].take_skipped(update.group)
        if report.skipped:
            versions.before_update(update.group, skipped=True)
            for parameter in parameters:
                parameter.grad = None
        elif not all(map(math.isfinite, norms)):
            raise FloatingPointError(
                f"the loss is finite and a gradient of stage {stage.index} is not; later stages have applied theirs"
            )
        elif self.held.optimizer is not None:
            factor = 1.0 if update.clip is None else gradients.clip_factor(gradients.total_norm(norms), update.clip)
            versions.before_update(update.group)
            with self._ledger.context() as context_id:
                self._publish_gradients(context_id, factor)
                self.held.optimizer.apply(self._ledger.get_gradients(context_id), update.changes)
        versions.after_update(update.group)
        if self._snapshots is not None:
            self._snapshots.updated(versions.newest, update.committed)
        report.losses, report.peak_in_flight[stage.index] = stage.take_losses(), stage.peak_in_flight
        report.peak_bytes[stage.index], report.recomputed[stage.index] = stage.peak_bytes, stage.segments.recomputed
        report.versions[stage.index] = versions.peak, versions.bytes
        report.spans.append(("U", stage.index, chunk, start, time.monotonic_ns(), versions.newest))
        self._add_arrivals(report)
        return report

    def _end_stream(self, updates: int | None = None) -> None:
        """No version but the newest is needed; ``updates``: go back to so many first."""
        if self._snapshots is not None:
            if updates is not None:
                self._snapshots.restore(updates)
            self._snapshots.close()
            self._snapshots = None
        for stage in self.held.stages.values():
            stage.versions = None
        self._stream_backwards.clear()
        self._clear()

    def reset(self, step: int) -> None:
        """Forget ``step``, which failed, unless the next one has begun (the messages may cross)."""
        if self._plan.step <= step:
            self._clear()

    def _clear(self) -> None:
        self._report = Report(self.name)
        # Values of the step that begins may have come already; those of earlier steps are history.
        while self._arrivals and self._arrivals[0][0] <= self._plan.step:
            self._arrivals.popleft()
        for stage in self.held.stages.values():
            stage.reset()
