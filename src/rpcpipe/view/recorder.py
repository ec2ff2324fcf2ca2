"""Collect what a live pipeline does. The driver's thread adds steps; the view's thread reads."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rpcpipe.cluster.liveness import ClusterEvent, WorkerStatus
from rpcpipe.driver.callbacks import record
from rpcpipe.driver.events import PipelineEvent
from rpcpipe.driver.result import StepResult
from rpcpipe.driver.stage_handle import HEADER
from rpcpipe.pipeline import Pipeline
from rpcpipe.schedules import Costs, Schedule, Timeline
from rpcpipe.view.history import History, Point
from rpcpipe.view.source import SPANS

log = logging.getLogger("rpcpipe")

_EVENTS = 100


class _Step(NamedTuple):
    """The last step: its figures and timeline, and what it ran under."""

    figures: Mapping[str, Any]
    timeline: Timeline
    schedule: Schedule
    streams: bool
    busy: Mapping[str, float]


class Recorder:
    """The steps of ``pipe`` from now on, and the state of its workers. A ``Source``.

    It keeps the figures and the newest timeline of results, and none of their tensors.
    """

    def __init__(self, pipe: Pipeline) -> None:
        self.history, self.version, self.closed = History(), 0, False
        self._pipe = pipe
        self._last = _Step({}, Timeline(workers=0), pipe.schedule, False, {})
        self._drawn: tuple[int, list[Timeline]] = (0, [])
        self._stages: tuple[Any, list[list[str]]] = (None, [])
        self._title = pipe.runtime.title()
        self._failed = False

    # --- on the driver's thread ---

    def add(self, result: StepResult) -> None:
        """Note a step that is done. Raises nothing: no fault of a view reaches the training."""
        try:
            self._add(result)
        except Exception:
            if not self._failed:
                log.warning("the live view cannot record step %s and goes on", result.step, exc_info=True)
            self._failed = True

    def _add(self, result: StepResult) -> None:
        runtime = self._pipe.runtime
        figures = {**record(result), "time": time.time()}
        self.history.add(Point.of(figures))
        self._last = _Step(figures, result.timeline, runtime.schedule, runtime.policy is not None, runtime.busy)
        self._title = runtime.title()
        self.version += 1

    # --- on the view's thread ---

    def refresh(self) -> None:
        """Do nothing: the driver's thread adds what is new."""

    def state(self) -> dict[str, Any]:
        """Return title, last step, workers, stages and events."""
        pipe, last = self._pipe, self._last
        stages = pipe.stages
        if stages is not self._stages[0] and not self.closed:
            rows = [row[:-1] for stage in stages for row in stage.rows({})]
            self._stages = stages, rows
        return {
            "title": self._title,
            "state": "closed" if self.closed else "live",
            "figures": last.figures,
            "workers": [_worker(status, last.busy) for status in pipe.cluster.status()],
            "stages": {"header": HEADER[:-1], "rows": self._stages[1]},
            "events": events(pipe.cluster.events, pipe.events),
        }

    def timelines(self) -> list[Timeline]:
        """Return the schedule simulated with the last step's mean durations, and the last step as it was measured."""
        last, version = self._last, self.version
        if not last.timeline.spans:
            return []
        if self._drawn[0] != version:
            planned = plan_of(last.timeline, last.schedule) if not last.streams else None
            measured = Timeline(last.timeline.spans, workers=last.timeline.workers, name="measured")
            self._drawn = version, [measured] if planned is None else [planned, measured]
        return self._drawn[1]


def plan_of(measured: Timeline, schedule: Schedule) -> Timeline | None:
    """Return the timeline of ``schedule`` with ``measured``'s mean durations, free transfers and no waiting.

    With replicas, each has the rows of its own workers and its own micro-batches. None for a step of so many actions
    that simulating it would take long, and for one of fewer micro-batches than the schedule has.
    """
    replicas = measured.workers // schedule.workers
    if len(measured.spans) > SPANS or replicas < 1:
        return None
    chunks = [
        sorted({span.chunk for span in measured.spans if span.kind == "F" and span.worker % replicas == replica})
        for replica in range(replicas)
    ]
    if any(len(own) != schedule.chunks for own in chunks):
        return None
    ideal = schedule.simulate(Costs.measured(measured, schedule.stages))
    spans = [
        span._replace(worker=span.worker * replicas + replica, chunk=chunks[replica][span.chunk])
        for replica in range(replicas)
        for span in ideal.spans
        if span.end > span.start
    ]
    return Timeline(spans, workers=measured.workers, name="planned")


def events(of_cluster: Sequence[ClusterEvent], of_pipeline: Sequence[PipelineEvent]) -> list[dict[str, Any]]:
    """Return the newest events of both, by time, fit for JSON."""
    found = [{"time": one.time, "kind": one.kind, "what": told(one)} for one in list(of_cluster)[-_EVENTS:]]
    found += [{"time": one.time, "kind": one.kind, "what": f"after step {one.step}: {one.how}"} for one in of_pipeline]
    return sorted(found, key=lambda one: float(str(one["time"])))[-_EVENTS:]


def told(event: ClusterEvent) -> str:
    """Return a cluster's event in one line."""
    took = f", in {event.seconds:.2f} s" if event.seconds is not None else ""
    return f"{event.worker} ({event.host}:{event.pid}) {event.how.splitlines()[0] if event.how else ''}{took}"


def _worker(status: WorkerStatus, busy: Mapping[str, float]) -> dict[str, Any]:
    worker = status.worker
    return {
        "name": worker.name, "place": f"{worker.host}:{worker.pid}", "device": worker.device,
        "stages": list(status.stages), "memory": status.memory, "tasks": status.finished,
        "state": "lost" if status.lost else status.doing or "not reported yet",
        "lost": status.lost, "spare": status.spare, "heard": status.heard, "busy": busy.get(worker.name),
    }  # fmt: skip
