"""Build a Timeline on the driver's clock from the workers' reports."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from rpcpipe.driver.driver import Driver
from rpcpipe.schedules import Action, Span, Timeline, Transfer
from rpcpipe.transport.base import Transport
from rpcpipe.worker.messages import Port, Report

_CLOCK_CALLS = 8


def clock_offset(driver: Driver, transport: Transport, worker: str) -> int:
    """Return the nanoseconds by which ``worker``'s clock is ahead of this process's.

    The quickest of a few calls is taken to have read the clock at its middle (Cristian, 1989); the error
    is at most half of that call's duration.
    """
    calls = []
    for _ in range(_CLOCK_CALLS):
        sent = time.monotonic_ns()
        there: int = driver.collect({worker: transport.call(worker, "clock")})[worker]
        back = time.monotonic_ns()
        calls.append((back - sent, there - (sent + back) // 2))
    return min(calls)[1]


def spans(reports: Mapping[str, Report], offsets: Mapping[str, int], step: int) -> list[Span]:
    """Return a span in seconds for every action of a step; ``offsets``: ns by which each worker's clock is ahead."""
    return [
        Span(index, kind, stage, chunk, (start - offsets[name]) * 1e-9, (end - offsets[name]) * 1e-9, step, used)
        for index, (name, report) in enumerate(reports.items())
        for kind, stage, chunk, start, end, used in report.spans
    ]


def updates(
    times: Mapping[str, tuple[int, int]], workers: Sequence[str], offsets: Mapping[str, int], step: int
) -> list[Span]:
    """Return a span in seconds for every worker's update; ``times``: by worker, its (start, end) in ns."""
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
        # Ends of transfers whose other end is not reported yet; a stream may report it some updates later.
        self._sent: dict[Port, tuple[int, Action, float, int]] = {}
        self._arrived: dict[Port, tuple[int, float]] = {}

    def step(self, reports: Mapping[str, Report], number: int) -> None:
        """Add the actions and transfers of step ``number``."""
        self.timeline.spans += spans(reports, self._offsets, number)
        for index, (name, report) in enumerate(reports.items()):
            offset = self._offsets[name]
            for producer, port, sent_ns in report.sends:
                self._sent[port] = index, producer, (sent_ns - offset) * 1e-9, number
            for port, arrived_ns in report.arrivals:
                self._arrived[port] = index, (arrived_ns - offset) * 1e-9
        for port in self._sent.keys() & self._arrived.keys():
            (source, producer, sent, step), (target, arrived) = self._sent.pop(port), self._arrived.pop(port)
            assert isinstance(port.action, Action)
            self.timeline.transfers.append(Transfer(source, target, producer, port.action, sent, arrived, step))

    def update(self, times: Mapping[str, tuple[int, int]], number: int) -> None:
        """Add the updates of step ``number``."""
        self.timeline.spans += updates(times, self._workers, self._offsets, number)
