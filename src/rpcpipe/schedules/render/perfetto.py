"""A timeline as a trace that https://ui.perfetto.dev and chrome://tracing open.

A process per timeline; per worker a track for computing and waiting and tracks for sends and
receives, as many as keep their slices from overlapping. Arrows lead from a send to its receive.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from rpcpipe.schedules.action import NAMES
from rpcpipe.schedules.spans import Span, Spans

# A track's number is worker × 1000 + one of these + lane.
_COMPUTE, _SEND, _RECEIVE = 0, 100, 500


def to_chrome(timelines: Sequence[Spans]) -> str:
    """Return the JSON text; times are microseconds from the timeline's start."""
    events: list[dict[str, Any]] = []
    for process, timeline in enumerate(timelines):
        events.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": timeline.name}})
        events += _compute(process, timeline)
        events += _moves(process, timeline)
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _compute(process: int, timeline: Spans) -> Iterable[dict[str, Any]]:
    origin = timeline.start
    for worker in range(timeline.workers):
        yield _track(process, worker, _COMPUTE, f"worker {worker}")
    for span in timeline.spans:
        name = _title(span) + (f" version {span.version}" if span.version >= 0 else "")
        yield _slice(process, span.worker, _COMPUTE, name, span.start - origin, span.end - origin, span.kind)
    for wait in timeline.waits():
        name = f"waits for {_title(wait)}"
        yield _slice(process, wait.worker, _COMPUTE, name, wait.start - origin, wait.end - origin, "wait")


def _moves(process: int, timeline: Spans) -> Iterable[dict[str, Any]]:
    """Yield the slices of sends, until their arrival, of receives, until their consumer starts, and the arrows."""
    origin = timeline.start
    started = {(span.step, span.kind, span.stage, span.chunk): span.start for span in timeline.spans}
    lanes: dict[tuple[int, int], list[float]] = {}
    for number, move in enumerate(sorted(timeline.transfers, key=lambda move: move.sent)):
        used = max(move.arrived, started.get((move.step, *move.consumer), move.arrived))
        send_lane, send_is_new = _lane(lanes, move.source, _SEND, move.sent, move.arrived)
        receive_lane, receive_is_new = _lane(lanes, move.target, _RECEIVE, move.arrived, used)
        send, receive, name = _SEND + send_lane, _RECEIVE + receive_lane, f"{move.producer} → {move.consumer}"
        if send_is_new:
            yield _track(process, move.source, send, f"worker {move.source} send")
        if receive_is_new:
            yield _track(process, move.target, receive, f"worker {move.target} receive")
        sent, arrived = move.sent - origin, move.arrived - origin
        yield _slice(process, move.source, send, name, sent, arrived, "send")
        yield _slice(process, move.target, receive, name, arrived, used - origin, "receive")
        arrow = {"cat": "flow", "name": name, "id": process * 10**7 + number, "pid": process}
        yield {**arrow, "ph": "s", "tid": _tid(move.source, send), "ts": sent * 1e6}
        yield {**arrow, "ph": "f", "bp": "e", "tid": _tid(move.target, receive), "ts": arrived * 1e6}


def _lane(
    lanes: dict[tuple[int, int], list[float]], worker: int, base: int, start: float, end: float
) -> tuple[int, bool]:
    """Occupy the first lane that is free at ``start`` until ``end``; return its number and whether it is new."""
    ends = lanes.setdefault((worker, base), [])
    for lane, free in enumerate(ends):
        if free <= start:
            ends[lane] = end
            return lane, False
    ends.append(end)
    return len(ends) - 1, True


def _title(span: Span) -> str:
    return NAMES[span.kind] if span.stage < 0 else f"{span.stage}{span.kind}{span.chunk}"


def _tid(worker: int, track: int) -> int:
    return worker * 1000 + track


def _track(process: int, worker: int, track: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": "thread_name", "pid": process, "tid": _tid(worker, track), "args": {"name": name}}


def _slice(process: int, worker: int, track: int, name: str, start: float, end: float, category: str) -> dict[str, Any]:
    return {
        "ph": "X", "pid": process, "tid": _tid(worker, track), "name": name, "cat": category,
        "ts": start * 1e6, "dur": max(0.0, end - start) * 1e6,
    }  # fmt: skip
