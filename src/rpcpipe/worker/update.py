"""The end of a step on one worker: from complete gradients to updated weights, or to none updated."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, assert_never

import torch

from rpcpipe.stage import gradients
from rpcpipe.stage.context import StepContext
from rpcpipe.stage.progress import Progress
from rpcpipe.stage.stage import Stage
from rpcpipe.worker.agreement import (
    Agreement,
    GradientGate,
    Verdict,
    divisor,
    losses_from,
    mean_loss,
    norms_from,
)
from rpcpipe.worker.gradient_exchange import Push
from rpcpipe.worker.messages import ORDERS, Norms, Orders, Port, Report, Updated
from rpcpipe.worker.operations import (
    CommitStep,
    GetReach,
    LastReport,
    LastUpdate,
    NormalizeGradients,
    PublishGradients,
    ShareWeights,
    TakeOrders,
    TellLosses,
    TellNorms,
    UndoUpdate,
    UpdateOperation,
    UpdateWeights,
)
from rpcpipe.worker.stage_set import StageSet


class Ledger(Protocol):
    """Stores gradients in distributed-autograd contexts."""

    def context(self) -> AbstractContextManager[int]: ...

    def accumulate(self, context_id: int, root: torch.Tensor) -> None: ...

    def get_gradients(self, context_id: int) -> Mapping[torch.Tensor, torch.Tensor]: ...


class Updater:
    """Updates the weights of ``held`` on worker ``name``.

    ``push``: sends (worker, port, value), as values of a step, None for the one under way.
    """

    def __init__(
        self,
        name: str,
        held: StageSet,
        ledger: Ledger,
        push: Callable[[Iterable[tuple[str, Port, Any]], int | None], None],
    ) -> None:
        self.ledger = ledger
        self._name, self._held, self._push = name, held, push
        self._loss: tuple[float, float | None] = 0.0, None
        self._orders = Orders((), Progress(1))

    def execute(self, operation: UpdateOperation, plan: StepContext, report: Report, inputs: Mapping[str, Any]) -> Any:
        """Execute ``operation`` of the step of ``plan``, whose actions are done and are in ``report``."""
        match operation:
            case NormalizeGradients(count):
                self._normalize(report, count)
                return report.norms
            case PublishGradients(context_id, factor):
                self.publish(context_id, factor)
            case UpdateWeights(context_id, changes):
                self._update(plan, report, context_id, changes)
            case LastUpdate():
                if self._held.optimizer is not None:
                    self._held.optimizer.undo.end()
                return report.updated
            case GetReach(step):
                return None if self._held.optimizer is None else self._held.optimizer.undo.reach(step)
            case TakeOrders(orders):
                self._orders = orders or inputs[ORDERS.slot]
            case TellLosses(agreement):
                others = agreement.others(self._name)
                self._push(((other, losses_from(self._name), report.losses) for other in others), None)
            case TellNorms(agreement):
                self._tell_norms(agreement, plan, report, inputs)
            case CommitStep(agreement):
                self._commit(agreement, plan, report, list(inputs.values()))
                return report
            case LastReport():
                return report
            case ShareWeights(step):
                self._push_weights(step)
            case UndoUpdate(step):
                if self._held.optimizer is not None:
                    self._held.optimizer.undo.take_back(step)
            case _:
                assert_never(operation)
        return None

    def add_norms(self, report: Report, stage: Stage) -> None:
        """Put the norms of the gradients of ``stage`` into ``report``."""
        report.norms[stage.index] = self._norms(stage)
        dtype = gradients.norm_dtype(stage.parameters)
        report.norm_dtype = dtype if len(report.norms) == 1 else torch.promote_types(report.norm_dtype, dtype)

    def _norms(self, stage: Stage) -> dict[int, float]:
        """Return the 2-norm of every gradient that this worker sums, by the parameter's index in the stage."""
        elsewhere = self._held.owned_elsewhere
        owned = {
            index: parameter
            for index, parameter in enumerate(stage.parameters)
            if parameter.grad is not None and parameter not in elsewhere
        }
        return dict(zip(owned, gradients.norms(list(owned.values())), strict=True))

    def _normalize(self, report: Report, count: float) -> None:
        """Divide all gradients by ``count``, and put the new norms into ``report``."""
        gradients.divide(self._held.parameters, count)
        report.norms = {index: self._norms(stage) for index, stage in self._held.stages.items()}

    def _tell_norms(self, agreement: Agreement, plan: StepContext, report: Report, told: Mapping[str, Any]) -> None:
        """Divide the gradients by the count of all losses, if there is one, and push their norms to all others."""
        losses = dict(report.losses)
        for others in told.values():
            losses |= others
        self._loss = mean_loss(losses, plan.weights)
        total = self._orders.progress.counted(self._loss[1])
        if total is not None:
            self._normalize(report, divisor(total))
        norms = report.gradient_norms
        self._push(((other, norms_from(self._name), norms) for other in agreement.others(self._name)), None)

    def _commit(self, agreement: Agreement | None, plan: StepContext, report: Report, others: Sequence[Norms]) -> None:
        """Update, unless a loss or a gradient is not finite: any, with ``agreement``, and else one of this worker."""
        own = report.gradient_norms
        if agreement is None:
            factor, sound = 1.0, own.finite and all(math.isfinite(loss) for loss, _ in report.losses.values())
        else:
            verdict = Verdict(*self._loss, GradientGate.of([own, *others], agreement.max_norm))
            factor, sound = verdict.gate.factor, verdict.sound
        if sound:
            with self.ledger.context() as context_id:
                self.publish(context_id, factor)
                self._update(plan, report, context_id, self._orders.changes)
            return
        self._push_weights()  # sharded: unchanged, but the others await them

    def publish(self, context_id: int, factor: float) -> None:
        """Add the gradients, times ``factor`` (clipping), to the step's distributed-autograd context."""
        parameters = self._held.parameters
        if factor != 1.0:
            gradients.scale(parameters, factor)
        root = gradients.take(parameters)
        if root is not None:
            with gradients.hooks_lifted(parameters):
                self.ledger.accumulate(context_id, root)

    def _update(self, plan: StepContext, report: Report, context_id: int, changes: Sequence[Mapping[str, Any]]) -> None:
        """Apply the context's gradients; report when, and what the optimizer has changed of its groups."""
        start, optimizer = time.monotonic_ns(), self._held.optimizer
        if optimizer is not None:
            optimizer.undo.begin(plan.step)
            optimizer.step(self.ledger.get_gradients(context_id), changes)
        report.updated = Updated(start, time.monotonic_ns(), () if optimizer is None else optimizer.changed)
        self._push_weights()

    def _push_weights(self, step: int | None = None) -> None:
        if self._held.spec.peers.shard:
            for exchange in self._held.exchanges.values():
                pushes: Iterable[Push] = exchange.weights()
                self._push(pushes, step)
