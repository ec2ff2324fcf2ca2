"""The driver's verdict on a step, from the workers' reports."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from rpcpipe.driver.driver import Driver
from rpcpipe.driver.result import mean_loss
from rpcpipe.errors import Failure, NonFiniteError, StageError
from rpcpipe.stage.context import StepContext
from rpcpipe.stage.progress import Progress
from rpcpipe.worker.agreement import GradientGate, Verdict
from rpcpipe.worker.messages import Report


def judge(
    driver: Driver,
    plan: StepContext,
    progress: Progress,
    reports: Mapping[str, Report],
    shares: Sequence[float],
    max_norm: float | None,
    *,
    divided: bool,
) -> Verdict:
    """Return the verdict on a step, after ``progress`` in an accumulation; ``shares``: the micro-batches' of the batch.

    If an update follows, the gradients of a loss of (sum, count) are divided by the count on the workers first, unless
    they have ``divided`` them.
    """
    loss, count = mean_loss(reports, shares)
    total = progress.counted(count)
    if plan.updates and total is not None and not divided:
        driver.normalize_gradients(plan.step, total, reports)
    gate = GradientGate.of((report.gradient_norms for report in reports.values()), max_norm)
    if not plan.updates:
        gate = dataclasses.replace(gate, grad_norm=gate.grad_norm / plan.scale / (total or 1.0))
    return Verdict(loss, count, gate)


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
