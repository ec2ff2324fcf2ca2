"""What a step gave."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rpcpipe import _tables
from rpcpipe.model.microbatch import Nest
from rpcpipe.schedules import Timeline
from rpcpipe.stage import gradients
from rpcpipe.worker.messages import Report

_HEADER = ("stage", "its worker busy", "peak in flight")


@dataclass(frozen=True, repr=False)
class StepResult:
    """Figures of one ``train_step``.

    ``loss`` is the mean over the batch, ``grad_norm`` the 2-norm of all gradients before clipping,
    ``seconds`` the driver's wall time, ``peak_in_flight`` the most micro-batches whose activations
    were alive at once, per stage, ``bubble`` the workers' measured idle share from the first
    action's start to the last one's end. ``applied`` is False where NaN or Inf in the gradients
    left the weights as they were, and where the gradients of ``accumulated`` calls, this one included,
    wait for those of further ones; ``grad_norm`` is then the norm so far. ``loss_scale`` is what the
    loss was multiplied by for the backward, 1 but under float16, ``lr`` the learning rate of every
    parameter group. By stage, ``peak_activation_bytes`` is the most memory that autograd had saved at
    once, the inputs of what is recomputed included and parameters not, and ``recomputed`` the number of
    layers' forwards that were run again. ``input_grads`` holds the gradients of the loss's mean for those inputs that
    require one, in a nest like the inputs with None elsewhere; None if no input does, and in a stream.

    Under an asynchronous schedule a result is of one batch in the stream: ``seconds`` since the
    result before, ``bubble`` each worker's idle share between its updates, ``grad_norm`` the mean over
    the batch's updates, of which ``skipped`` were left out. By stage, ``versions`` says with how many
    updates in the weights each of the batch's minibatches was computed, ``staleness`` how many were
    missing at most, ``peak_versions`` how many versions were held at once since the stream last stood
    empty, and ``peak_version_bytes`` how large they were.
    """

    step: int
    loss: float
    grad_norm: float
    seconds: float
    peak_in_flight: tuple[int, ...]
    applied: bool
    timeline: Timeline = field(repr=False, compare=False)
    peak_activation_bytes: tuple[int, ...] = ()
    recomputed: tuple[int, ...] = ()
    lr: tuple[float, ...] = ()
    skipped: int = 0
    versions: tuple[tuple[int, ...], ...] = ()
    staleness: tuple[int, ...] = ()
    peak_versions: tuple[int, ...] = ()
    peak_version_bytes: tuple[int, ...] = ()
    accumulated: int = 0
    loss_scale: float = 1.0
    idle: float | None = field(default=None, repr=False)
    input_grads: Nest = field(default=None, repr=False, compare=False)

    @property
    def bubble(self) -> float:
        return self.timeline.bubble if self.idle is None else self.idle

    def __repr__(self) -> str:
        return f"{self._title()}\n{_tables.text(_HEADER, self._rows())}"

    def _repr_html_(self) -> str:
        return _tables.markup(self._title(), _HEADER, self._rows())

    def _title(self) -> str:
        state = "" if self.applied else ", not applied (NaN or Inf)"
        if self.accumulated:
            state = f", {self.accumulated} accumulated"
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


def mean_loss(
    reports: Mapping[str, Report], weights: Sequence[float] | Mapping[int, float]
) -> tuple[float, float | None]:
    """(mean over the batch, total count or None) from the last stage's losses."""
    losses = {chunk: loss for report in reports.values() for chunk, loss in report.losses.items()}
    counts = [count for _, count in losses.values() if count is not None]
    if not counts:
        return sum(losses[chunk][0] * weights[chunk] for chunk in sorted(losses)), None
    total = sum(counts)
    return sum(losses[chunk][0] for chunk in sorted(losses)) / total if total else float("nan"), total


def by_stage(reports: Mapping[str, Report], field: str, joined: Callable[[list[int]], int] = max) -> tuple[int, ...]:
    """A report's field of one number per stage, of all stages; ``joined``: what replicas' numbers make together."""
    found: dict[int, list[int]] = {}
    for report in reports.values():
        for stage, value in getattr(report, field).items():
            found.setdefault(stage, []).append(value)
    return tuple(joined(found[stage]) for stage in sorted(found))


@dataclass(frozen=True)
class StreamedBatch:
    """A batch of a stream: the groups of micro-batches that its updates are made of, counted from update ``base`` on.

    ``shares``: by micro-batch, its share of the batch. ``lr``: by parameter group.
    """

    base: int
    groups: range
    shares: Mapping[int, float]
    lr: tuple[float, ...]

    @property
    def number(self) -> int:
        """The batch's first update."""
        return self.base + self.groups.start


def of_stream(
    batch: StreamedBatch,
    reports: Mapping[str, Report],
    updates: Sequence[Sequence[Report]],
    timeline: Timeline,
    *,
    seconds: float,
    ended: Mapping[str, int],
) -> StepResult:
    """A batch's result from its workers' ``reports``, joined, and those of each of its ``updates``.

    ``ended``: when each worker's last update before ended, by its own clock.
    """
    done = [group for group in updates if not group[0].skipped]
    norms = [
        gradients.total_norm([norm for report in group for of in report.norms.values() for norm in of.values()])
        for group in done
    ]
    used = [
        [
            span.version
            for span in timeline.spans
            if span.stage == stage and span.kind == "B" and span.chunk in batch.shares
        ]
        for stage in range(len(reports))
    ]
    held = [report.versions[stage] for stage, report in enumerate(reports.values())]
    owners = [group for group in batch.groups for _ in range(len(batch.shares) // len(batch.groups))]
    return StepResult(
        batch.number,
        mean_loss(reports, batch.shares)[0],
        sum(norms) / len(norms) if norms else math.nan,
        seconds,
        by_stage(reports, "peak_in_flight"),
        len(done) == len(updates),
        timeline,
        peak_activation_bytes=by_stage(reports, "peak_bytes"),
        recomputed=by_stage(reports, "recomputed"),
        lr=batch.lr,
        skipped=len(updates) - len(done),
        versions=tuple(tuple(batch.base + version for version in versions) for versions in used),
        staleness=tuple(max(g - v for g, v in zip(owners, versions, strict=True)) for versions in used),
        peak_versions=tuple(count for count, _ in held),
        peak_version_bytes=tuple(count * size for count, size in held),
        idle=sum(_idle(report, ended.get(name)) for name, report in reports.items()) / len(reports),
    )


def last_update(report: Report) -> int:
    """When the worker's last update in ``report`` ended, by its own clock in ns."""
    return max(end for kind, _, _, _, end, _ in report.spans if kind == "U")


def _idle(report: Report, since: int | None) -> float:
    """Idle share from ``since``, the end of the update before if there was one, to the worker's last update."""
    end = last_update(report)
    start = min(begin for _, _, _, begin, _, _ in report.spans) if since is None else since
    busy = sum(max(0, stop - max(start, begin)) for _, _, _, begin, stop, _ in report.spans)
    return max(0.0, 1.0 - busy / max(1, end - start))
