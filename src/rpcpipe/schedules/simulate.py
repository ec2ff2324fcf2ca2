"""What a schedule would take: the same Timeline that a traced step yields, computed."""

from __future__ import annotations

import bisect
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rpcpipe.errors import ScheduleError
from rpcpipe.schedules.action import KINDS, Action
from rpcpipe.schedules.shared_cores import share
from rpcpipe.schedules.timeline import Span, Timeline, Transfer
from rpcpipe.schedules.weight_versions import choose, version

if TYPE_CHECKING:
    from rpcpipe.schedules.schedule import Schedule

PerStage = float | Sequence[float]


@dataclass(frozen=True)
class Costs:
    """Durations in seconds (or any one unit), for all stages or a sequence with one per stage.

    A whole backward takes ``backward``, by default ``input_gradient + weight_gradient``. A result
    that changes worker arrives ``latency + output_bytes / bandwidth`` after it is produced, without
    holding either worker. ``recompute`` is the forward that precedes a backward; it needs no gradient and
    begins while that is under way. ``optimizer`` follows the last action of all workers (the gate), or is the
    duration of every update of an asynchronous schedule. Where there are fewer ``cores`` than workers at
    work, they share them in equal parts.
    """

    forward: PerStage = 1.0
    input_gradient: PerStage = 1.0
    weight_gradient: PerStage = 1.0
    backward: PerStage | None = None
    latency: float = 0.0
    bandwidth: float = float("inf")
    output_bytes: PerStage = 0.0
    recompute: PerStage = 0.0
    optimizer: float = 0.0
    cores: float | None = None

    def of(self, kind: str, stage: int) -> float:
        """Duration of an action of ``kind`` on ``stage``."""
        if kind == "F":
            return _at(self.forward, stage)
        if kind == "I":
            return _at(self.input_gradient, stage)
        if kind == "W":
            return _at(self.weight_gradient, stage)
        if kind == "U":
            return self.optimizer
        if self.backward is not None:
            return _at(self.backward, stage)
        return _at(self.input_gradient, stage) + _at(self.weight_gradient, stage)

    def replay(self, stage: int) -> float:
        """Duration of the forward that precedes ``stage``'s backward."""
        return _at(self.recompute, stage)

    def transfer(self, producer: Action) -> float:
        """Time from the end of ``producer`` until its result is on another worker.

        A gradient is as large as the output of the stage before.
        """
        stage = producer.stage if producer.kind == "F" else producer.stage - 1
        return self.latency + _at(self.output_bytes, stage) / self.bandwidth

    @classmethod
    def measured(cls, timeline: Timeline, stages: int) -> Costs:
        """The mean durations by stage in a measured timeline; transfers are free, as in the ideal."""
        total: dict[tuple[str, int], list[float]] = {}
        for span in timeline.spans:
            total.setdefault((span.kind, span.stage), []).append(span.end - span.start)

        def mean(kind: str) -> list[float]:
            found = [total.get((kind, stage), [0.0]) for stage in range(stages)]
            return [sum(times) / len(times) for times in found]

        updates = mean("U")
        return cls(
            forward=mean("F"), input_gradient=mean("I"), weight_gradient=mean("W"), backward=mean("B"),
            optimizer=sum(updates) / len(updates),
        )  # fmt: skip


def _at(value: PerStage, stage: int) -> float:
    return value[stage] if isinstance(value, Sequence) else value


def simulate(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    """Run ``schedule`` on paper; raises ScheduleError where it would deadlock."""
    costs = costs or Costs()
    for name in ("forward", "input_gradient", "weight_gradient", "backward", "output_bytes", "recompute"):
        value = getattr(costs, name)
        if isinstance(value, Sequence) and len(value) != schedule.stages:
            raise ScheduleError(f"costs.{name} has {len(value)} entries for {schedule.stages} stages")
    durations: dict[str, list[float]] = {
        kind: [costs.of(kind, stage) for stage in range(schedule.stages)] for kind in KINDS
    }
    with _without_gc():
        if costs.cores is not None and costs.cores < schedule.workers:
            spans, transfers, free = share(schedule, costs, durations)
        else:
            spans, transfers, free = _run(schedule, costs, durations)
    if schedule.asynchronous:
        spans = _with_versions(schedule, spans)
    elif costs.optimizer:
        gate = max(free)
        spans += [Span(worker, "U", -1, -1, gate, gate + costs.optimizer) for worker in range(schedule.workers)]
    return Timeline(spans, transfers, workers=schedule.workers, name=schedule.name)


def _run(
    schedule: Schedule, costs: Costs, durations: dict[str, list[float]]
) -> tuple[list[Span], list[Transfer], list[float]]:
    end: dict[Action, float] = {}
    free = [0.0] * schedule.workers
    spans: list[Span] = []
    transfers: list[Transfer] = []
    placement = schedule.placement
    charged = bool(costs.latency or costs.output_bytes)
    replays = [costs.replay(stage) for stage in range(schedule.stages)] if costs.recompute else None
    for worker, action, dependencies in schedule.walk(end):
        kind, stage, chunk = action
        ready = free[worker]
        duration = durations[kind][stage]
        for needed in dependencies:
            arrival = end[needed]
            if charged and placement[needed[1]] != worker:
                sent, arrival = arrival, arrival + costs.transfer(needed)
                transfers.append(Transfer(placement[needed[1]], worker, needed, action, sent, arrival))
            if arrival > ready:
                ready = arrival
        if replays is not None and kind in "BI":
            if ready > free[worker]:  # begun in the wait, and always finished
                ready = max(ready, free[worker] + replays[stage])
            else:
                duration += replays[stage]
        end[action] = free[worker] = finish = ready + duration
        spans.append(Span(worker, kind, stage, chunk, ready, finish))
    return spans, transfers, free


def _with_versions(schedule: Schedule, spans: list[Span]) -> list[Span]:
    """Every span with the version of the weights that it uses or makes."""
    policy = choose(schedule.name, None)
    ends = sorted({span.chunk for span in spans if span.kind == "U"})
    found = []
    for span in spans:
        group = bisect.bisect_left(ends, span.chunk)
        used = group + 1 if span.kind == "U" else version(policy or "stash", group, span.stage, schedule.stages)
        found.append(span._replace(version=used))
    return found


@contextmanager
def _without_gc() -> Iterator[None]:
    """Millions of tuples and no cycles: the collector would double the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def critical_path(timeline: Timeline, schedule: Schedule) -> list[Span]:
    """The chain of spans that determines the makespan, first to last.

    From the last span to end, step by step to whatever let it start: the dependency or the span
    before on the same worker that ended last.
    """
    spans = [span for span in timeline.spans if span.stage >= 0]
    by_action = {Action(span.kind, span.stage, span.chunk): span for span in spans}  # type: ignore[arg-type]
    before: dict[Span, Span] = {}
    last: dict[int, Span] = {}
    for span in sorted(spans, key=lambda span: (span.start, span.end)):
        if span.worker in last:
            before[span] = last[span.worker]
        last[span.worker] = span
    path = [max(spans, key=lambda span: span.end)]
    while True:
        here = path[-1]
        needed = schedule.dependencies(Action(here.kind, here.stage, here.chunk))  # type: ignore[arg-type]
        candidates = [by_action[action] for action in needed]
        if here in before:
            candidates.append(before[here])
        if not candidates:
            return path[::-1]
        path.append(max(candidates, key=lambda span: span.end))
