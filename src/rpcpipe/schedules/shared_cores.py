"""Simulation on fewer cores than workers: busy workers share the cores in equal parts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rpcpipe.schedules.action import Action
from rpcpipe.schedules.costs import Costs
from rpcpipe.schedules.order import Order
from rpcpipe.schedules.spans import Span, Transfer


def simulate_shared(
    order: Order, costs: Costs, durations: dict[str, list[float]]
) -> tuple[list[Span], list[Transfer], list[float]]:
    """Return spans, transfers and the end of every worker's last action, on ``costs.cores`` cores.

    ``durations[kind][stage]``: seconds on a core of one's own. Raises ScheduleError where ``order`` can never finish.
    """
    for _ in order.walk():
        pass
    simulation = _Simulation(order, costs, durations)
    simulation.run()
    return simulation.spans, simulation.transfers, [worker.end for worker in simulation.workers]


@dataclass
class _Worker:
    """A worker's position in its row. ``left``: core seconds of its action, or of the recomputation before it."""

    index: int
    position: int = 0
    left: float = 0.0
    start: float = 0.0
    busy: bool = False
    recomputing: bool = False
    recomputed: bool = False
    end: float = 0.0


class _Simulation:
    """An event by event simulation: between two events every busy worker has the same share of the cores."""

    def __init__(self, order: Order, costs: Costs, durations: dict[str, list[float]]) -> None:
        self.order, self.costs, self.durations = order, costs, durations
        self.now = 0.0
        self.end: dict[Action, float] = {}
        self.spans: list[Span] = []
        self.transfers: list[Transfer] = []
        self.workers = [_Worker(index) for index in range(order.workers)]

    def run(self) -> None:
        """Advance from event to event until every row is done. The order must be one that can finish."""
        while any(worker.position < len(self.order.actions[worker.index]) for worker in self.workers):
            arrivals = [self._begin(worker) for worker in self.workers if not worker.busy]
            busy = [worker for worker in self.workers if worker.busy]
            share = min(1.0, (self.costs.cores or math.inf) / len(busy)) if busy else 1.0
            ends = [self.now + worker.left / share for worker in busy]
            then = min([*ends, *arrivals])
            assert then < math.inf, "order.walk refuses what cannot finish"
            for worker, end in zip(busy, ends, strict=True):
                worker.left = max(0.0, worker.left - (then - self.now) * share)
                if end == then:
                    self._finish(worker, then)
            self.now = then

    def _begin(self, worker: _Worker) -> float:
        """Start what the worker can do now and return infinity, else return when its input arrives if known."""
        row = self.order.actions[worker.index]
        if worker.position == len(row):
            return math.inf
        kind, stage, _ = row[worker.position]
        ready = self._ready(worker.index, row[worker.position])
        recomputation = self.costs.recomputation(stage) if kind in "BI" and not worker.recomputed else 0.0
        if ready > self.now and not recomputation:
            return ready
        worker.recomputing = ready > self.now
        worker.left = recomputation if worker.recomputing else self.durations[kind][stage] + recomputation
        worker.start, worker.busy = self.now, True
        return math.inf

    def _ready(self, worker: int, action: Action) -> float:
        """Return when all dependencies of ``action`` are on ``worker``; infinity where that is not known yet."""
        ready = 0.0
        for needed in self.order.dependencies(action):
            if needed not in self.end:
                return math.inf
            moved = self.order.placement[needed.stage] != worker
            ready = max(ready, self.end[needed] + (self.costs.transfer(needed) if moved else 0.0))
        return ready

    def _finish(self, worker: _Worker, now: float) -> None:
        worker.busy = False
        worker.recomputed = worker.recomputing
        if worker.recomputing:
            worker.recomputing = False
            return
        action = self.order.actions[worker.index][worker.position]
        self._add_transfers(worker.index, action)
        self.spans.append(Span(worker.index, *action, worker.start, now))
        self.end[action] = worker.end = now
        worker.position += 1

    def _add_transfers(self, worker: int, action: Action) -> None:
        for needed in self.order.dependencies(action):
            source, sent = self.order.placement[needed.stage], self.end[needed]
            if source != worker and (self.costs.latency or self.costs.output_bytes):
                arrived = sent + self.costs.transfer(needed)
                self.transfers.append(Transfer(source, worker, needed, action, sent, arrived))
