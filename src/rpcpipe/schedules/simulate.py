"""The timeline that an order would have under given costs: the same type that a traced step yields."""

from __future__ import annotations

import bisect
import gc
from collections.abc import Iterator
from contextlib import contextmanager

from rpcpipe.schedules.action import KINDS, Action
from rpcpipe.schedules.costs import Costs
from rpcpipe.schedules.order import Order
from rpcpipe.schedules.shared_cores import simulate_shared
from rpcpipe.schedules.spans import Span, Spans, Transfer
from rpcpipe.schedules.timeline import Timeline
from rpcpipe.schedules.weight_versions import STASH, choose


def simulate(order: Order, costs: Costs | None = None) -> Timeline:
    """Predict the timeline of ``order``; ``costs`` defaults to F = I = W = 1, free communication.

    Raises ScheduleError where ``order`` would deadlock, ArgumentError where ``costs`` has another number of stages.
    """
    costs = costs or Costs()
    costs.check(order.stages)
    durations: dict[str, list[float]] = {
        kind: [costs.of(kind, stage) for stage in range(order.stages)] for kind in KINDS
    }
    with _without_gc():
        if costs.cores is not None and costs.cores < order.workers:
            spans, transfers, ends = simulate_shared(order, costs, durations)
        else:
            spans, transfers, ends = _simulate_unshared(order, costs, durations)
    if order.asynchronous:
        spans = _with_versions(order, spans)
    elif costs.optimizer:
        starts = _updates_alone(order, costs, ends) if costs.update_alone else [max(ends)] * order.workers
        spans += [Span(worker, "U", -1, -1, start, start + costs.optimizer) for worker, start in enumerate(starts)]
    return Timeline(spans, transfers, workers=order.workers, name=order.name)


def _simulate_unshared(
    order: Order, costs: Costs, durations: dict[str, list[float]]
) -> tuple[list[Span], list[Transfer], list[float]]:
    """Return spans, transfers and the end of every worker's last action, each worker having a core of its own."""
    end: dict[Action, float] = {}
    free = [0.0] * order.workers
    ends = [0.0] * order.workers
    spans: list[Span] = []
    transfers: list[Transfer] = []
    placement, charged = order.placement, costs.transfers_cost
    recomputations = [costs.recomputation(stage) for stage in range(order.stages)] if costs.recompute_seconds else None
    for worker, action, dependencies in order.walk(end):
        kind, stage, chunk = action
        ready = free[worker]
        duration, received = durations[kind][stage], 0.0
        for needed in dependencies:
            arrival = end[needed]
            if charged and placement[needed[1]] != worker:
                sent, received = arrival + costs.sending(needed), costs.receive_overhead
                arrival = sent + costs.transfer(needed)
                transfers.append(Transfer(placement[needed[1]], worker, needed, action, sent, arrival))
            if arrival > ready:
                ready = arrival
        if recomputations is not None and kind in "BI":
            if ready > free[worker]:  # it starts during the wait, and is always finished
                ready = max(ready, free[worker] + recomputations[stage])
            else:
                duration += recomputations[stage]
        start = ready + received
        end[action] = ends[worker] = finish = start + duration
        free[worker] = finish + costs.action_overhead
        if costs.send_overhead and order.leaves_worker(action):
            free[worker] += costs.sending(action)
        spans.append(Span(worker, kind, stage, chunk, start, finish))
    return spans, transfers, ends


def _updates_alone(order: Order, costs: Costs, ends: list[float]) -> list[float]:
    """Return when every worker has done its last action, which ends at ``ends``, and sent the result."""
    sending = [costs.sending(row[-1]) if row and order.leaves_worker(row[-1]) else 0.0 for row in order.actions]
    return [end + more for end, more in zip(ends, sending, strict=True)]


def _with_versions(order: Order, spans: list[Span]) -> list[Span]:
    """Return every span with the version of the weights that it uses or makes."""
    policy = choose(order.name, None) or STASH
    group_ends = sorted({span.chunk for span in spans if span.kind == "U"})
    versioned = []
    for span in spans:
        group = bisect.bisect_left(group_ends, span.chunk)
        used = group + 1 if span.kind == "U" else policy.version(group, span.stage, order.stages)
        versioned.append(span._replace(version=used))
    return versioned


@contextmanager
def _without_gc() -> Iterator[None]:
    """Suspend the garbage collector: with millions of tuples and no cycles, it would double the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def critical_path(timeline: Spans, order: Order) -> list[Span]:
    """Return the chain of spans that determines the makespan, first to last.

    Each span is preceded by whatever let it start: of its dependencies and the span before it on the
    same worker, the one that ended last.
    """
    spans = [span for span in timeline.spans if span.stage >= 0]
    by_action = {_action(span): span for span in spans}
    before = _before_on_worker(spans)
    path = [max(spans, key=lambda span: span.end)]
    while True:
        candidates = [by_action[action] for action in order.dependencies(_action(path[-1]))]
        if path[-1] in before:
            candidates.append(before[path[-1]])
        if not candidates:
            return path[::-1]
        path.append(max(candidates, key=lambda span: span.end))


def _action(span: Span) -> Action:
    return Action(span.kind, span.stage, span.chunk)  # type: ignore[arg-type]


def _before_on_worker(spans: list[Span]) -> dict[Span, Span]:
    """Return for every span but the first ones the span before it on the same worker."""
    before: dict[Span, Span] = {}
    last: dict[int, Span] = {}
    for span in sorted(spans, key=lambda span: (span.start, span.end)):
        if span.worker in last:
            before[span] = last[span.worker]
        last[span.worker] = span
    return before
