"""From workers' reports to a Timeline on the driver's clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rpcpipe.schedules import Action, Span, Timeline, Transfer
from rpcpipe.worker.messages import Port, Report


def spans(reports: Mapping[str, Report], offsets: Mapping[str, int], step: int) -> list[Span]:
    """Every action of a step; ``offsets``: nanoseconds by which a worker's clock is ahead."""
    return [
        Span(index, kind, stage, chunk, (start - offsets[name]) * 1e-9, (end - offsets[name]) * 1e-9, step, used)
        for index, (name, report) in enumerate(reports.items())
        for kind, stage, chunk, start, end, used in report.spans
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
        # Halves of transfers, until the other one is reported: in a stream perhaps some updates later.
        self._sent: dict[Port, tuple[int, Action, float, int]] = {}
        self._arrived: dict[Port, tuple[int, float]] = {}

    def step(self, reports: Mapping[str, Report], number: int) -> None:
        """Add a step's actions and transfers."""
        self.timeline.spans += spans(reports, self._offsets, number)
        for index, (name, report) in enumerate(reports.items()):
            offset = self._offsets[name]
            for producer, port, at in report.sends:
                self._sent[port] = index, producer, (at - offset) * 1e-9, number
            for port, at in report.arrivals:
                self._arrived[port] = index, (at - offset) * 1e-9
        for port in self._sent.keys() & self._arrived.keys():
            (source, producer, sent, of), (target, arrived) = self._sent.pop(port), self._arrived.pop(port)
            assert isinstance(port.action, Action)
            self.timeline.transfers.append(Transfer(source, target, producer, port.action, sent, arrived, of))

    def update(self, times: Mapping[str, tuple[int, int]], number: int) -> None:
        """Add a step's optimizer."""
        self.timeline.spans += updates(times, self._workers, self._offsets, number)
