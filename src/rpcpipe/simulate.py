"""What a schedule would take: the same Timeline that a traced step yields, computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rpcpipe.errors import ScheduleError
from rpcpipe.schedules.action import Action
from rpcpipe.timeline import Span, Timeline

if TYPE_CHECKING:
    from rpcpipe.schedules.schedule import Schedule

PerStage = float | Sequence[float]


@dataclass(frozen=True)
class Costs:
    """Durations in seconds (or any one unit), for all stages or a sequence with one per stage.

    A whole backward ``B`` takes ``input_gradient + weight_gradient``. A result that changes
    worker arrives ``latency + output_bytes / bandwidth`` after it is produced, without holding
    either worker. ``optimizer`` follows the last action of all workers (the gate).
    """

    forward: PerStage = 1.0
    input_gradient: PerStage = 1.0
    weight_gradient: PerStage = 1.0
    latency: float = 0.0
    bandwidth: float = float("inf")
    output_bytes: PerStage = 0.0
    optimizer: float = 0.0

    def of(self, kind: str, stage: int) -> float:
        """Duration of an action of ``kind`` on ``stage``."""
        if kind == "F":
            return _at(self.forward, stage)
        if kind == "I":
            return _at(self.input_gradient, stage)
        if kind == "W":
            return _at(self.weight_gradient, stage)
        return _at(self.input_gradient, stage) + _at(self.weight_gradient, stage)

    def transfer(self, producer: Action) -> float:
        """Time from the end of ``producer`` until its result is on another worker.

        A gradient is as large as the output of the stage before.
        """
        stage = producer.stage if producer.kind == "F" else producer.stage - 1
        return self.latency + _at(self.output_bytes, stage) / self.bandwidth


def _at(value: PerStage, stage: int) -> float:
    return value[stage] if isinstance(value, Sequence) else value


def simulate(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    """Run ``schedule`` on paper; raises ScheduleError where it would deadlock."""
    costs = costs or Costs()
    for name in ("forward", "input_gradient", "weight_gradient", "output_bytes"):
        value = getattr(costs, name)
        if isinstance(value, Sequence) and len(value) != schedule.stages:
            raise ScheduleError(f"costs.{name} has {len(value)} entries for {schedule.stages} stages")
    end: dict[Action, float] = {}
    free = [0.0] * schedule.workers
    spans: list[Span] = []
    for worker, action in schedule.walk():
        ready = free[worker]
        for needed in schedule.dependencies(action):
            arrival = end[needed]
            if schedule.placement[needed.stage] != worker:
                arrival += costs.transfer(needed)
            ready = max(ready, arrival)
        finish = ready + costs.of(action.kind, action.stage)
        end[action] = free[worker] = finish
        spans.append(Span(worker, action.kind, action.stage, action.chunk, ready, finish))
    if costs.optimizer:
        gate = max(free)
        spans += [Span(worker, "U", -1, -1, gate, gate + costs.optimizer) for worker in range(schedule.workers)]
    return Timeline(spans, workers=schedule.workers, name=schedule.name)
