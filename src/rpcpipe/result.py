"""What a step gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rpcpipe import tables
from rpcpipe.messages import Report
from rpcpipe.timeline import Timeline

_HEADER = ("stage", "its worker busy", "peak in flight")


@dataclass(frozen=True, repr=False)
class StepResult:
    """Figures of one ``train_step``.

    ``loss`` is the mean over the batch, ``grad_norm`` the 2-norm of all gradients before clipping,
    ``seconds`` the driver's wall time, ``peak_in_flight`` the most micro-batches whose activations
    were alive at once, per stage, ``bubble`` the workers' measured idle share from the first
    action's start to the last one's end. ``applied`` is False where NaN or Inf in the gradients
    left the weights as they were.
    """

    step: int
    loss: float
    grad_norm: float
    seconds: float
    peak_in_flight: tuple[int, ...]
    applied: bool
    timeline: Timeline = field(repr=False, compare=False)

    @property
    def bubble(self) -> float:
        return self.timeline.bubble

    def __repr__(self) -> str:
        return f"{self._title()}\n{tables.text(_HEADER, self._rows())}"

    def _repr_html_(self) -> str:
        return tables.markup(self._title(), _HEADER, self._rows())

    def _title(self) -> str:
        state = "" if self.applied else ", not applied (NaN or Inf)"
        return (
            f"step {self.step}: loss {self.loss:.4f}, gradient norm {self.grad_norm:.4g},"
            f" {self.seconds * 1e3:.1f} ms, bubble {self.bubble:.1%}{state}"
        )

    def _rows(self) -> list[list[str]]:
        workers = {span.stage: span.worker for span in self.timeline.spans}
        busy, makespan = self.timeline.busy, self.timeline.makespan or 1.0
        return [
            [str(stage), f"{busy[workers[stage]] / makespan:.1%}", str(peak)]
            for stage, peak in enumerate(self.peak_in_flight)
        ]


def mean_loss(reports: Mapping[str, Report], weights: tuple[float, ...]) -> tuple[float, float | None]:
    """(mean over the batch, total count or None) from the last stage's losses."""
    losses = {chunk: loss for report in reports.values() for chunk, loss in report.losses.items()}
    counts = [count for _, count in losses.values() if count is not None]
    if not counts:
        return sum(losses[chunk][0] * weights[chunk] for chunk in sorted(losses)), None
    total = sum(counts)
    return sum(losses[chunk][0] for chunk in sorted(losses)) / total if total else float("nan"), total


def peaks(reports: Mapping[str, Report]) -> tuple[int, ...]:
    """Peak in flight per stage."""
    found = {stage: peak for report in reports.values() for stage, peak in report.peak_in_flight.items()}
    return tuple(found[stage] for stage in sorted(found))
