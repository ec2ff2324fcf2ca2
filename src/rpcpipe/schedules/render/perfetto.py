"""A timeline as a trace that https://ui.perfetto.dev and chrome://tracing open.

A process per timeline; per worker a track for computing and waiting and tracks for sends and
receives, as many as keep their slices from overlapping. Arrows lead from a send to its receive.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from rpcpipe.schedules.action import NAMES
from rpcpipe.schedules.timeline import Span, Timeline, Transfer

# Track numbers: worker × 1000 + one of these + lane.
_COMPUTE, _SEND, _RECEIVE = 0, 100, 500


def to_chrome(timelines: Sequence[Timeline]) -> str:
    """The JSON text; times are microseconds from the timeline's start."""
    events: list[dict[str, Any]] = []
    for process, timeline in enumerate(timelines):
        events.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": timeline.name}})
        events += _compute(process, timeline)
        events += _moves(process, timeline)
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _compute(process: int, timeline: Timeline) -> Iterable[dict[str, Any]]:
    origin = timeline.start
    for worker in range(timeline.workers):
        yield _track(process, worker, _COMPUTE, f"worker {worker}")
    for span in timeline.spans:
        name = _title(span) + (f" version {span.version}" if span.version >= 0 else "")
        yield _slice(process, span.worker, _COMPUTE, name, span.start - origin, span.end - origin, span.kind)
    for wait in timeline.waits():
        name = f"waits for {_title(wait)}"
        yield _slice(process, wait.worker, _COMPUTE, name, wait.start - origin, wait.end - origin, "wait")


def _moves(process: int, timeline: Timeline) -> Iterable[dict[str, Any]]:
    """A send takes until its arrival; a receive from there until its consumer starts."""
    origin = timeline.start
    started = {(span.step, span.kind, span.stage, span.chunk): span.start for span in timeline.spans}
    lanes: dict[tuple[int, int], list[float]] = {}
    for number, move in enumerate(sorted(timeline.transfers, key=lambda move: move.sent)):
        used = max(move.arrived, started.get((move.step, *move.consumer), move.arrived))
        sending = _lane(lanes, move.source, _SEND, move.sent, move.arrived)
        receiving = _lane(lanes, move.target, _RECEIVE, move.arrived, used)
        for worker, base, lane, what in (
            (move.source, _SEND, sending, "send"),
            (move.target, _RECEIVE, receiving, "receive"),
        ):
            if lane[1]:
                yield _track(process, worker, base + lane[0], f"worker {worker} {what}")
        yield _slice(
            process, move.source, _SEND + sending[0], _moved(move), move.sent - origin, move.arrived - origin, "send"
        )
        yield _slice(
            process, move.target, _RECEIVE + receiving[0], _moved(move), move.arrived - origin, used - origin, "receive"
        )
        arrow = {"cat": "flow", "name": _moved(move), "id": process * 10**7 + number, "pid": process}
        yield {**arrow, "ph": "s", "tid": _tid(move.source, _SEND + sending[0]), "ts": (move.sent - origin) * 1e6}
        yield {
            **arrow, "ph": "f", "bp": "e", "tid": _tid(move.target, _RECEIVE + receiving[0]),
            "ts": (move.arrived - origin) * 1e6,
        }  # fmt: skip


def _lane(
    lanes: dict[tuple[int, int], list[float]], worker: int, base: int, start: float, end: float
) -> tuple[int, bool]:
    """(the first lane free at ``start``, whether it is new)."""
    ends = lanes.setdefault((worker, base), [])
    for lane, free in enumerate(ends):
        if free <= start:
            ends[lane] = end
            return lane, False
    ends.append(end)
    return len(ends) - 1, True


def _title(span: Span) -> str:
    return NAMES[span.kind] if span.stage < 0 else f"{span.stage}{span.kind}{span.chunk}"


def _moved(move: Transfer) -> str:
    return f"{move.producer} → {move.consumer}"


def _tid(worker: int, track: int) -> int:
    return worker * 1000 + track


def _track(process: int, worker: int, track: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": "thread_name", "pid": process, "tid": _tid(worker, track), "args": {"name": name}}


def _slice(process: int, worker: int, track: int, name: str, start: float, end: float, category: str) -> dict[str, Any]:
    return {
        "ph": "X", "pid": process, "tid": _tid(worker, track), "name": name, "cat": category,
        "ts": start * 1e6, "dur": max(0.0, end - start) * 1e6,
    }  # fmt: skip
