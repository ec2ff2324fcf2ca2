"""When every worker did what, predicted or measured, and the figures computed from it."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

from rpcpipe.schedules.action import Action


class Span(NamedTuple):
    """One action on one worker; ``start`` and ``end`` in seconds on the driver's clock.

    ``kind`` is F, B, I, W as in a schedule, or U for the optimizer's update: of the whole step (stage and
    chunk -1), or in asynchronous schedules of one stage after ``chunk``. There ``version`` is the
    version of the weights that the action used, or that the update made.
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
    """A value sent from ``producer`` on worker ``source`` to ``consumer`` on worker ``target``.

    ``sent`` and ``arrived`` in seconds on the driver's clock.
    """

    source: int
    target: int
    producer: Action
    consumer: Action
    sent: float
    arrived: float
    step: int = 0


class Spans:
    """The spans and transfers of one step, or of several.

    The lists grow while a step is traced, so no figure is cached.
    """

    def __init__(
        self, spans: Iterable[Span] = (), transfers: Iterable[Transfer] = (), *, workers: int, name: str = ""
    ) -> None:
        self.spans = list(spans)
        self.transfers = list(transfers)
        self.workers = workers
        self.name = name

    @property
    def start(self) -> float:
        """The time at which the first span starts, in seconds."""
        return min((span.start for span in self.spans), default=0.0)

    @property
    def makespan(self) -> float:
        """Seconds from the first start to the last end."""
        return max((span.end for span in self.spans), default=0.0) - self.start

    @property
    def busy(self) -> tuple[float, ...]:
        """Seconds of work per worker."""
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
        """Return the gaps between a worker's spans, each with the kind, stage and chunk that it waited for."""
        rows: dict[int, list[Span]] = {}
        for span in sorted(self.spans, key=lambda span: (span.start, span.end)):
            rows.setdefault(span.worker, []).append(span)
        return [
            Span(worker, after.kind, after.stage, after.chunk, before.end, after.start, after.step)
            for worker, row in rows.items()
            for before, after in pairwise(row)
            if after.start > before.end
        ]
