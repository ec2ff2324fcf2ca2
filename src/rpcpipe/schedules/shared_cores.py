"""What a schedule would take on fewer cores than workers: who is at work shares the cores in equal parts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rpcpipe.schedules.action import Action
from rpcpipe.schedules.timeline import Span, Transfer

if TYPE_CHECKING:
    from rpcpipe.schedules.schedule import Schedule
    from rpcpipe.schedules.simulate import Costs


@dataclass
class _Worker:
    """Where a worker is in its row. ``left``: core seconds of what it is at; of a replay, if ``replaying``."""

    index: int
    at: int = 0
    left: float = 0.0
    start: float = 0.0
    busy: bool = False
    replaying: bool = False
    replayed: bool = False
    end: float = 0.0


class _Run:
    """An event by event simulation: between two events every running worker has the same share."""

    def __init__(self, schedule: Schedule, costs: Costs, durations: dict[str, list[float]]) -> None:
        self.schedule, self.costs, self.durations = schedule, costs, durations
        self.now = 0.0
        self.end: dict[Action, float] = {}
        self.spans: list[Span] = []
        self.transfers: list[Transfer] = []
        self.workers = [_Worker(index) for index in range(schedule.workers)]

    def run(self) -> None:
        """Until every row is done; the schedule is one that can finish."""
        while any(worker.at < len(self.schedule.actions[worker.index]) for worker in self.workers):
            arrivals = [self._begin(worker) for worker in self.workers if not worker.busy]
            running = [worker for worker in self.workers if worker.busy]
            share = min(1.0, (self.costs.cores or math.inf) / len(running)) if running else 1.0
            ends = [self.now + worker.left / share for worker in running]
            then = min([*ends, *arrivals])
            assert then < math.inf, "schedule.walk refuses what cannot finish"
            for worker, end in zip(running, ends, strict=True):
                worker.left = max(0.0, worker.left - (then - self.now) * share)
                if end == then:
                    self._finish(worker, then)
            self.now = then

    def _begin(self, worker: _Worker) -> float:
        """Start what the worker can do now; else when its input arrives, as far as that is known."""
        row = self.schedule.actions[worker.index]
        if worker.at == len(row):
            return math.inf
        kind, stage, _ = row[worker.at]
        ready = self._ready(worker.index, row[worker.at])
        replay = self.costs.replay(stage) if kind in "BI" and not worker.replayed else 0.0
        if ready > self.now and not replay:
            return ready
        worker.replaying = ready > self.now
        worker.left = replay if worker.replaying else self.durations[kind][stage] + replay
        worker.start, worker.busy = self.now, True
        return math.inf

    def _ready(self, worker: int, action: Action) -> float:
        """When all that ``action`` needs is there."""
        ready = 0.0
        for needed in self.schedule.dependencies(action):
            if needed not in self.end:
                return math.inf
            moved = self.schedule.placement[needed.stage] != worker
            ready = max(ready, self.end[needed] + (self.costs.transfer(needed) if moved else 0.0))
        return ready

    def _finish(self, worker: _Worker, now: float) -> None:
        worker.busy = False
        worker.replayed = worker.replaying
        if worker.replaying:
            worker.replaying = False
            return
        action = self.schedule.actions[worker.index][worker.at]
        for needed in self.schedule.dependencies(action):
            source, sent = self.schedule.placement[needed.stage], self.end[needed]
            if source != worker.index and (self.costs.latency or self.costs.output_bytes):
                arrived = sent + self.costs.transfer(needed)
                self.transfers.append(Transfer(source, worker.index, needed, action, sent, arrived))
        self.spans.append(Span(worker.index, *action, worker.start, now))
        self.end[action] = worker.end = now
        worker.at += 1


def share(
    schedule: Schedule, costs: Costs, durations: dict[str, list[float]]
) -> tuple[list[Span], list[Transfer], list[float]]:
    """Spans, transfers, and when each worker was done. Raises ScheduleError where nothing can finish."""
    for _ in schedule.walk():
        pass
    run = _Run(schedule, costs, durations)
    run.run()
    return run.spans, run.transfers, [worker.end for worker in run.workers]
