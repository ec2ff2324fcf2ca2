"""From workers' reports to a Timeline on the driver's clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rpcpipe.messages import Report
from rpcpipe.timeline import Span, Timeline, Transfer


def spans(reports: Mapping[str, Report], offsets: Mapping[str, int], step: int) -> list[Span]:
    """Every action of a step; ``offsets``: nanoseconds by which a worker's clock is ahead."""
    return [
        Span(index, kind, stage, chunk, (start - offsets[name]) * 1e-9, (end - offsets[name]) * 1e-9, step)
        for index, (name, report) in enumerate(reports.items())
        for kind, stage, chunk, start, end in report.spans
    ]


def transfers(reports: Mapping[str, Report], offsets: Mapping[str, int], step: int) -> list[Transfer]:
    """Every value that changed worker, from the sender's and the receiver's halves."""
    arrived = {
        action: (index, (at - offsets[name]) * 1e-9)
        for index, (name, report) in enumerate(reports.items())
        for action, at in report.arrivals
    }
    return [
        Transfer(
            index, arrived[consumer][0], producer, consumer, (at - offsets[name]) * 1e-9, arrived[consumer][1], step
        )
        for index, (name, report) in enumerate(reports.items())
        for producer, consumer, at in report.sends
        if consumer in arrived
    ]


def updates(
    times: Mapping[str, tuple[int, int]], workers: Sequence[str], offsets: Mapping[str, int], step: int
) -> list[Span]:
    """The optimizer's work on every worker."""
    return [
        Span(workers.index(name), "U", -1, -1, (start - offsets[name]) * 1e-9, (end - offsets[name]) * 1e-9, step)
        for name, (start, end) in times.items()
    ]


class Tracer:
    """Fills ``timeline`` step by step while a ``with pipe.trace()`` block is open."""

    def __init__(self, workers: Sequence[str], offsets: Mapping[str, int], name: str) -> None:
        self.timeline = Timeline(workers=len(workers), name=name)
        self._workers = list(workers)
        self._offsets = offsets

    def step(self, reports: Mapping[str, Report], number: int) -> None:
        """Add a step's actions and transfers."""
        self.timeline.spans += spans(reports, self._offsets, number)
        self.timeline.transfers += transfers(reports, self._offsets, number)

    def update(self, times: Mapping[str, tuple[int, int]], number: int) -> None:
        """Add a step's optimizer."""
        self.timeline.spans += updates(times, self._workers, self._offsets, number)
