"""When every worker did what: predicted by the simulator or measured on a run, one type for both."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from rpcpipe.schedules.action import Action


class Span(NamedTuple):
    """One piece of work on one worker; ``start`` and ``end`` in seconds on the driver's clock.

    ``kind`` is F, B, I, W as in a schedule, or U for the optimizer's update: of the whole step (stage and
    chunk -1), or in asynchronous schedules of one stage after ``chunk``. There ``version`` says which
    version of the weights was used, or for U made.
    """

    worker: int
    kind: str
    stage: int
    chunk: int
    start: float
    end: float
    step: int = 0
    version: int = -1


class Transfer(NamedTuple):
    """A value on its way from ``producer`` on worker ``source`` to ``consumer`` on worker ``target``."""

    source: int
    target: int
    producer: Action
    consumer: Action
    sent: float
    arrived: float
    step: int = 0


class Timeline:
    """Spans and transfers of one step, or of several, with the figures read off them.

    A traced timeline grows while its ``with`` block is open, so nothing is cached.
    """

    def __init__(
        self, spans: Iterable[Span] = (), transfers: Iterable[Transfer] = (), *, workers: int, name: str = ""
    ) -> None:
        self.spans = list(spans)
        self.transfers = list(transfers)
        self.workers = workers
        self.name = name

    def __repr__(self) -> str:
        return (
            f"Timeline({self.name!r}, {len(self.spans)} spans on {self.workers} workers,"
            f" makespan {self.makespan:.4g}, bubble {self.bubble:.1%})"
        )

    @property
    def start(self) -> float:
        return min((span.start for span in self.spans), default=0.0)

    @property
    def makespan(self) -> float:
        """Time from the first start to the last end."""
        return max((span.end for span in self.spans), default=0.0) - self.start

    @property
    def busy(self) -> tuple[float, ...]:
        """Working time per worker."""
        total = [0.0] * self.workers
        for span in self.spans:
            total[span.worker] += span.end - span.start
        return tuple(total)

    @property
    def bubble(self) -> float:
        """Idle time ÷ makespan, mean over the workers."""
        makespan = self.makespan
        return 1.0 - sum(self.busy) / (self.workers * makespan) if makespan else 0.0

    @property
    def peak_in_flight(self) -> tuple[int, ...]:
        """Per worker, the most (stage, micro-batch) pairs whose activations were alive at once.

        A pair is alive from its forward until its whole backward or its weight gradient ends.
        """
        alive, peak = [0] * self.workers, [0] * self.workers
        for span in sorted(self.spans, key=lambda span: (span.start, span.end)):
            if span.kind == "F":
                alive[span.worker] += 1
                peak[span.worker] = max(peak[span.worker], alive[span.worker])
            elif span.kind in "BW":
                alive[span.worker] -= 1
        return tuple(peak)

    def waits(self) -> list[Span]:
        """The gaps between a worker's spans, each with the kind, stage and chunk that it waited for."""
        rows: dict[int, list[Span]] = {}
        for span in sorted(self.spans, key=lambda span: (span.start, span.end)):
            rows.setdefault(span.worker, []).append(span)
        return [
            Span(worker, after.kind, after.stage, after.chunk, before.end, after.start, after.step)
            for worker, row in rows.items()
            for before, after in pairwise(row)
            if after.start > before.end
        ]

    def to_text(self, width: int = 100) -> str:
        """The timeline as lines of at most ``width`` characters."""
        from rpcpipe.schedules.render import to_text

        return to_text([self], width)

    def save(self, path: str | Path) -> None:
        """Write a picture: .svg, .png (need matplotlib), .html, or .json for Perfetto and Chrome."""
        from rpcpipe.schedules.render import save

        save([self], Path(path))


def compare(planned: Timeline, measured: Timeline, path: str | Path | None = None, *, width: int = 100) -> str:
    """Both timelines as one text on one scale of time; ``path`` gets the picture as well.

    Where ``planned`` is in other units (unit costs), it is stretched to the measured makespan.
    """
    from rpcpipe.schedules.render import save, to_text

    if planned.makespan and not 0.2 < planned.makespan / (measured.makespan or 1.0) < 5:
        planned = _stretched(planned, measured.makespan / planned.makespan)
    if path is not None:
        save([planned, measured], Path(path))
    return to_text([planned, measured], width)


def _stretched(timeline: Timeline, factor: float) -> Timeline:
    return Timeline(
        (span._replace(start=span.start * factor, end=span.end * factor) for span in timeline.spans),
        (move._replace(sent=move.sent * factor, arrived=move.arrived * factor) for move in timeline.transfers),
        workers=timeline.workers,
        name=timeline.name,
    )
