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


# What a worker does with an action, in this order; only a wait may lie between recomputation and the rest.
_RECOMPUTE, _RECEIVE, _ACT, _SEND, _REST = range(5)


@dataclass
class _Worker:
    """A worker's position in its row. ``left``: core seconds of the ``phase`` in which it is busy."""

    index: int
    position: int = 0
    phase: int = _REST
    left: float = 0.0
    start: float = 0.0
    busy: bool = False
    recomputed: bool = False
    end: float = 0.0


class _Simulation:
    """An event by event simulation: between two events every busy worker has the same share of the cores."""

    def __init__(self, order: Order, costs: Costs, durations: dict[str, list[float]]) -> None:
        self.order, self.costs, self.durations = order, costs, durations
        self.now = 0.0
        self.end: dict[Action, float] = {}
        self.sent: dict[Action, float] = {}
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
        action = row[worker.position]
        ready = self._ready(worker.index, action)
        if ready <= self.now:
            self._enter(worker, _RECEIVE, self.now)
            return math.inf
        recomputation = self._recomputation(worker, action)
        if not recomputation:
            return ready
        worker.phase, worker.left, worker.busy = _RECOMPUTE, recomputation, True
        return math.inf

    def _recomputation(self, worker: _Worker, action: Action) -> float:
        return self.costs.recomputation(action.stage) if action.kind in "BI" and not worker.recomputed else 0.0

    def _ready(self, worker: int, action: Action) -> float:
        """Return when all dependencies of ``action`` are on ``worker``; infinity where that is not known yet."""
        ready = 0.0
        for needed in self.order.dependencies(action):
            moved = self.order.placement[needed.stage] != worker
            if needed not in (self.sent if moved else self.end):
                return math.inf
            ready = max(ready, self.sent[needed] + self.costs.transfer(needed) if moved else self.end[needed])
        return ready

    def _enter(self, worker: _Worker, phase: int, now: float) -> None:
        """Begin the first phase from ``phase`` on that takes any time; after the last one the worker is idle."""
        action = self.order.actions[worker.index][worker.position]
        worker.busy = True
        for worker.phase in range(phase, _REST + 1):
            if worker.phase == _ACT:
                worker.start = now
            elif worker.phase == _SEND:
                self._acted(worker, action, now)
            elif worker.phase == _REST:
                self.sent[action] = now
            worker.left = self._work(worker, action)
            if worker.left or worker.phase == _ACT:
                return
        self._next(worker)

    def _work(self, worker: _Worker, action: Action) -> float:
        """Return the core seconds of the worker's phase."""
        if worker.phase == _ACT:
            return self.durations[action.kind][action.stage] + self._recomputation(worker, action)
        if worker.phase == _REST:
            return self.costs.action_overhead
        if worker.phase == _SEND:
            return self.costs.sending(action) if self.order.leaves_worker(action) else 0.0
        moved = (self.order.placement[needed.stage] != worker.index for needed in self.order.dependencies(action))
        return self.costs.receive_overhead * any(moved)

    def _finish(self, worker: _Worker, now: float) -> None:
        if worker.phase == _RECOMPUTE:
            worker.recomputed, worker.busy = True, False
        elif worker.phase == _REST:
            self._next(worker)
        else:
            self._enter(worker, worker.phase + 1, now)

    def _next(self, worker: _Worker) -> None:
        worker.position += 1
        worker.recomputed = worker.busy = False

    def _acted(self, worker: _Worker, action: Action, now: float) -> None:
        self._add_transfers(worker.index, action)
        self.spans.append(Span(worker.index, *action, worker.start, now))
        self.end[action] = worker.end = now

    def _add_transfers(self, worker: int, action: Action) -> None:
        for needed in self.order.dependencies(action):
            source = self.order.placement[needed.stage]
            if source != worker and self.costs.transfers_cost:
                sent = self.sent[needed]
                arrived = sent + self.costs.transfer(needed)
                self.transfers.append(Transfer(source, worker, needed, action, sent, arrived))
