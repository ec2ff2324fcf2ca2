"""The gate between a step's gradients and the weights: what the workers' reports say of them together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rpcpipe.driver.accumulation import Progress
from rpcpipe.driver.driver import Driver
from rpcpipe.driver.result import mean_loss
from rpcpipe.errors import Failure, NonFiniteError, StageError
from rpcpipe.stage import gradients
from rpcpipe.stage.context import StepContext
from rpcpipe.worker.messages import Report


@dataclass(frozen=True)
class GradientGate:
    """The gradients' norm over all stages, and the ``factor`` that clips them."""

    grad_norm: float
    factor: float

    @property
    def finite(self) -> bool:
        """Whether every gradient is finite."""
        return math.isfinite(self.grad_norm)

    @classmethod
    def of(cls, reports: Mapping[str, Report], max_norm: float | None) -> GradientGate:
        """Return the 2-norm of all gradients, with the factor by which ``clip_grad_norm_(…, max_norm)`` clips them."""
        by_stage: dict[int, dict[int, float]] = {}
        for report in reports.values():
            for stage, norms in report.norms.items():
                by_stage.setdefault(stage, {}).update(norms)  # replicas report different ones
        found = [norm for _, norms in sorted(by_stage.items()) for _, norm in sorted(norms.items())]
        dtype = gradients.joint_dtype(report.norm_dtype for report in reports.values() if any(report.norms.values()))
        norm = gradients.total_norm(found, dtype)
        return cls(norm, 1.0 if max_norm is None else gradients.clip_factor(norm, max_norm, dtype))


@dataclass(frozen=True)
class Verdict:
    """A batch's mean ``loss``, its ``count`` if the loss returns (sum, count), and whether its gradients may be used.

    ``overflowed``: a gradient was not finite before it was divided by the count, as GradScaler judges; a count of 0
    makes NaN but is no overflow of the scale. ``spoiled``: the loss is not finite, whose gradients may be finite.
    """

    loss: float
    count: float | None
    gate: GradientGate
    overflowed: bool

    @property
    def spoiled(self) -> bool:
        """Whether the loss is not finite, other than that of a batch without anything to count."""
        return not math.isfinite(self.loss) and self.count != 0.0

    @property
    def sound(self) -> bool:
        """Whether the loss and all gradients are finite."""
        return self.gate.finite and not self.spoiled


def judge(
    driver: Driver,
    plan: StepContext,
    progress: Progress,
    reports: Mapping[str, Report],
    shares: Sequence[float],
    max_norm: float | None,
) -> Verdict:
    """Return the verdict on a step, after ``progress`` in an accumulation; ``shares``: the micro-batches' of the batch.

    If an update follows, the gradients of a loss of (sum, count) are divided by the count on the workers first.
    """
    loss, count = mean_loss(reports, shares)
    total = progress.counted(count)
    gate = GradientGate.of(reports, max_norm)
    overflowed = not gate.finite
    if plan.updates and total is not None:
        driver.normalize_gradients(plan.step, total, reports)
        gate = GradientGate.of(reports, max_norm)
    elif not plan.updates:
        gate = dataclasses.replace(gate, grad_norm=gate.grad_norm / plan.scale / (total or 1.0))
    return Verdict(loss, count, gate, overflowed)


def refuse_nonfinite(reports: Mapping[str, Report], last_stage: int) -> None:
    """Raise StageError for the last stage whose gradient is not finite, or for the loss.

    The last such stage is the first in the order of the backwards.
    """
    entries = [(stage, name, norms) for name, report in reports.items() for stage, norms in report.norms.items()]
    for stage, name, norms in sorted(entries, reverse=True):
        if not all(map(math.isfinite, norms.values())):
            message = f"a gradient of stage {stage} is not finite (nonfinite='stop')"
            raise StageError.of(Failure.stated(NonFiniteError, message, worker=name, stage=stage))
    for name, report in reports.items():
        for chunk, (value, _) in sorted(report.losses.items()):
            if not math.isfinite(value):
                message = f"the loss of micro-batch {chunk} is {value} (nonfinite='stop')"
                raise StageError.of(Failure.stated(NonFiniteError, message, worker=name, stage=last_stage))
