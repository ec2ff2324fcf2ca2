"""Results: the figures of one synchronous step, or of one batch of a stream."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from rpcpipe import _tables
from rpcpipe.model.batch import Size
from rpcpipe.model.microbatch import Nest, merge, unpack
from rpcpipe.schedules import Timeline
from rpcpipe.stage import gradients
from rpcpipe.stage.metrics import means
from rpcpipe.worker import agreement
from rpcpipe.worker.messages import Report

_HEADER = ("stage", "its worker busy", "peak in flight")


@dataclass(frozen=True, repr=False, kw_only=True)
class StepResult:
    """Figures of one ``train_step``.

    ``loss`` is the mean over the batch, ``grad_norm`` the 2-norm of all gradients before clipping,
    ``seconds`` the driver's wall time, ``peak_in_flight`` the most micro-batches whose activations
    were alive at once, per stage, ``bubble`` the workers' measured idle share from the first
    action's start to the last one's end. ``applied`` is False where a loss or gradient that is
    not finite left the weights as they were, and where the gradients of ``accumulated`` calls, this one included,
    wait for those of further calls; ``grad_norm`` is then the norm so far. ``loss_scale`` is the factor
    of the loss in the backward, 1 except under float16, ``lr`` the learning rate of every
    parameter group. By stage, ``peak_activation_bytes`` is the most memory that autograd had saved at
    once, which includes the inputs of recomputed layers and excludes parameters, and ``recomputed`` the
    number of layer forwards that were recomputed. ``metrics`` and ``outputs`` are those that the call asked for.
    ``input_grads`` holds the gradients of the mean loss for the inputs that require one, in a nest like the inputs
    with None elsewhere; None if no input does, and in a stream. ``outputs`` and ``input_grads`` are typed Any,
    because the model decides what they are. ``samples`` is the size of the batch, and ``tokens`` the elements of inputs
    that are token ids, integers of shape (batch, length): of the tensor called ``input_ids``, or else of the first one;
    0 for other inputs.
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
    accumulated: int = 0
    samples: float = 0.0
    tokens: int = 0
    loss_scale: float = 1.0
    metrics: Mapping[str, float] = field(default_factory=dict, repr=False)
    outputs: Nest = field(default=None, repr=False, compare=False)
    input_grads: Nest = field(default=None, repr=False, compare=False)

    @property
    def bubble(self) -> float:
        """The workers' idle share of the step."""
        return self.timeline.bubble

    @property
    def throughput(self) -> float:
        """Tokens per second where inputs are token ids, else samples per second, of the batch in ``seconds``."""
        return (self.tokens or self.samples) / self.seconds if self.seconds else math.nan

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
    """Return (mean loss over the batch, total count) of all ``reports``, as ``agreement.mean_loss``."""
    losses = {chunk: loss for report in reports.values() for chunk, loss in report.losses.items()}
    return agreement.mean_loss(losses, weights)


def mean_metrics(reports: Mapping[str, Report]) -> dict[str, float]:
    """Return each metric's mean over the batch, empty where nothing was measured."""
    measured = {chunk: sums for report in reports.values() for chunk, sums in report.metrics.items()}
    return means(measured[chunk] for chunk in sorted(measured))


def merged_outputs(reports: Mapping[str, Report]) -> Nest:
    """Return the outputs of the whole batch, None where none were kept."""
    packed = {chunk: part for report in reports.values() for chunk, part in report.outputs.items()}
    return merge([unpack(packed[chunk]) for chunk in sorted(packed)]) if packed else None


def by_stage(reports: Mapping[str, Report], field: str, joined: Callable[[list[int]], int] = max) -> tuple[int, ...]:
    """Return the reports' ``field``, a number per stage, of all stages in order.

    ``joined`` reduces the numbers of a stage's replicas to one.
    """
    values: dict[int, list[int]] = {}
    for report in reports.values():
        for stage, value in getattr(report, field).items():
            values.setdefault(stage, []).append(value)
    return tuple(joined(values[stage]) for stage in sorted(values))


@dataclass(frozen=True)
class StreamedBatch:
    """A batch of a stream. ``groups`` are its updates, counted from update ``base`` of the pipeline on.

    ``shares``: each micro-batch's share of the batch. ``lr``: the learning rate of every parameter group.
    """

    base: int
    groups: range
    shares: Mapping[int, float]
    lr: tuple[float, ...]
    size: Size

    @property
    def number(self) -> int:
        """The number of the batch's first update."""
        return self.base + self.groups.start


@dataclass(frozen=True, repr=False, kw_only=True)
class StreamResult(StepResult):
    """Figures of one batch of a stream, which an asynchronous schedule trains.

    ``seconds`` counts from the result before, ``bubble`` is the mean of the workers' idle shares between
    their updates, and ``grad_norm`` the mean over the batch's updates, of which ``skipped`` were left out.
    By stage, ``versions`` gives the number of updates in the weights with which each of the batch's
    minibatches was computed, ``staleness`` the most updates that were missing, ``peak_versions`` the most
    versions held at once since the stream last stood empty, and ``peak_version_bytes`` their size.
    """

    skipped: int
    versions: tuple[tuple[int, ...], ...]
    staleness: tuple[int, ...]
    peak_versions: tuple[int, ...]
    peak_version_bytes: tuple[int, ...]
    idle: float = field(repr=False)

    @property
    def bubble(self) -> float:
        """The workers' mean idle share between their updates."""
        return self.idle

    @classmethod
    def of_batch(
        cls,
        *,
        batch: StreamedBatch,
        reports: Mapping[str, Report],
        updates: Sequence[Sequence[Report]],
        timeline: Timeline,
        seconds: float,
        ended: Mapping[str, int],
    ) -> Self:
        """Build the result of ``batch`` from its workers' joined ``reports`` and each update's reports.

        ``ended``: by worker, when its last update before the batch ended, in ns of the worker's clock.
        """
        applied = [update for update in updates if not update[0].skipped]
        norms = [_update_norm(update) for update in applied]
        used = [_versions_used(timeline, stage, batch.shares) for stage in range(len(reports))]
        held = [report.versions[stage] for stage, report in enumerate(reports.values())]
        groups = [group for group in batch.groups for _ in range(len(batch.shares) // len(batch.groups))]
        return cls(
            step=batch.number,
            loss=mean_loss(reports, batch.shares)[0],
            grad_norm=sum(norms) / len(norms) if norms else math.nan,
            seconds=seconds,
            peak_in_flight=by_stage(reports, "peak_in_flight"),
            applied=len(applied) == len(updates),
            timeline=timeline,
            peak_activation_bytes=by_stage(reports, "peak_bytes"),
            recomputed=by_stage(reports, "recomputed"),
            lr=batch.lr,
            samples=batch.size.samples,
            tokens=batch.size.tokens,
            metrics=mean_metrics(reports),
            outputs=merged_outputs(reports),
            skipped=len(updates) - len(applied),
            versions=tuple(tuple(batch.base + version for version in versions) for versions in used),
            staleness=tuple(max(g - v for g, v in zip(groups, versions, strict=True)) for versions in used),
            peak_versions=tuple(count for count, _ in held),
            peak_version_bytes=tuple(count * size for count, size in held),
            idle=sum(_idle(report, ended.get(name)) for name, report in reports.items()) / len(reports),
        )


def _update_norm(update: Sequence[Report]) -> float:
    """Return the 2-norm of all gradients of one update, from its workers' reports."""
    return gradients.total_norm(
        [norm for report in update for norms in report.norms.values() for norm in norms.values()],
        gradients.joint_dtype(report.norm_dtype for report in update if any(report.norms.values())),
    )


def _versions_used(timeline: Timeline, stage: int, chunks: Container[int]) -> list[int]:
    """Return the weight version of each backward of ``chunks`` on ``stage``, in the order of execution."""
    return [
        span.version for span in timeline.spans if span.stage == stage and span.kind == "B" and span.chunk in chunks
    ]


def last_update(report: Report) -> int:
    """Return when the worker's last update in ``report`` ended, in ns of its clock."""
    return max(end for kind, _, _, _, end, _ in report.spans if kind == "U")


def _idle(report: Report, since: int | None) -> float:
    """Return the idle share of a worker from ``since`` to the end of its last update in ``report``.

    ``since``: when the update before ended, in ns; None for the start of the report's first action.
    """
    end = last_update(report)
    start = min(begin for _, _, _, begin, _, _ in report.spans) if since is None else since
    busy = sum(max(0, stop - max(start, begin)) for _, _, _, begin, stop, _ in report.spans)
    return max(0.0, 1.0 - busy / max(1, end - start))
