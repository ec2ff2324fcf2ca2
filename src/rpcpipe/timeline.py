"""When every worker did what: predicted by the simulator or measured on a run, one type for both."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import NamedTuple


class Span(NamedTuple):
    """One piece of work on one worker; ``start`` and ``end`` in seconds on the driver's clock.

    ``kind`` is F, B, I, W as in a schedule, or U for the optimizer's update.
    """

    worker: int
    kind: str
    stage: int
    chunk: int
    start: float
    end: float


class Timeline:
    """Spans of one step, or of several, with the figures read off them."""

    def __init__(self, spans: Iterable[Span], *, workers: int, name: str = "") -> None:
        self.spans = list(spans)
        self.workers = workers
        self.name = name

    def __repr__(self) -> str:
        return (
            f"Timeline({self.name!r}, {len(self.spans)} spans on {self.workers} workers,"
            f" makespan {self.makespan:.4g}, bubble {self.bubble:.1%})"
        )

    @cached_property
    def start(self) -> float:
        return min((span.start for span in self.spans), default=0.0)

    @cached_property
    def makespan(self) -> float:
        """Time from the first start to the last end."""
        return max((span.end for span in self.spans), default=0.0) - self.start

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """Working time per worker."""
        total = [0.0] * self.workers
        for span in self.spans:
            total[span.worker] += span.end - span.start
        return tuple(total)

    @property
    def bubble(self) -> float:
        """Idle time ÷ makespan, mean over the workers."""
        if not self.makespan:
            return 0.0
        return 1.0 - sum(self.busy) / (self.workers * self.makespan)

    @cached_property
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

    def to_text(self, width: int = 100) -> str:
        """The timeline as lines of at most ``width`` characters."""
        from rpcpipe.render import to_text

        return to_text(self, width)
