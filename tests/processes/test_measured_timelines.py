"""Measured timelines: complete, on one clock, in the schedule's order."""

from __future__ import annotations

import time

import pytest

import rpcpipe as rp
from rpcpipe.driver import tracing
from rpcpipe.driver.tracing import clock_offset
from rpcpipe.worker.messages import Report
from support.models import adamw, batches, cross_entropy, mlp, sgd


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb-v"])
def test_a_traced_step_has_all_actions_transfers_and_updates(cluster: rp.Cluster, schedule: str) -> None:
    pipe = rp.Pipeline(
        mlp(), cluster, loss=cross_entropy, optimizer=adamw, schedule=schedule, chunks=8,
        virtual_stages=rp.schedules.fewest_virtual_stages(schedule),
    )  # fmt: skip
    data = list(batches(3, 16))
    pipe.train_step(*data[0])
    before = time.monotonic()
    with pipe.trace() as timeline:
        pipe.train_step(*data[1])
        pipe.train_step(*data[2])
    after = time.monotonic()
    pipe.train_step(*data[0])  # not traced
    planned = pipe.schedule
    assert before < timeline.start < timeline.start + timeline.makespan < after
    for step in (1, 2):
        spans = [span for span in timeline.spans if span.step == step]
        rows: list[list[rp.schedules.Action]] = [[] for _ in range(4)]
        for span in sorted(spans, key=lambda span: span.start):
            if span.kind != "U":
                rows[span.worker].append(rp.schedules.Action(span.kind, span.stage, span.chunk))  # type: ignore[arg-type]
        assert tuple(map(tuple, rows)) == planned.actions
        assert [span.kind for span in spans].count("U") == 4
        end = {rp.schedules.Action(s.kind, s.stage, s.chunk): s.end for s in spans}  # type: ignore[arg-type]
        start = {rp.schedules.Action(s.kind, s.stage, s.chunk): s.start for s in spans}  # type: ignore[arg-type]
        assert all(start[a] >= end[d] for row in planned.actions for a in row for d in planned.dependencies(a))
        moves = [move for move in timeline.transfers if move.step == step]
        crossing = [a for row in planned.actions for a in row if _crosses(planned, a)]
        assert sorted(move.producer for move in moves) == sorted(crossing)
        for move in moves:
            assert end[move.producer] <= move.sent <= move.arrived <= start[move.consumer]
    assert len(timeline.transfers) == 2 * len(crossing)
    pipe.close()


def _crosses(schedule: rp.Schedule, action: rp.schedules.Action) -> bool:
    consumer = schedule.consumer(action)
    return consumer is not None and schedule.placement[consumer.stage] != schedule.placement[action.stage]


def test_remote_clocks_are_brought_to_the_drivers(cluster: rp.Cluster) -> None:
    pipe = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=sgd)
    assert (
        abs(clock_offset(pipe.runtime.driver, pipe.cluster.transport, "worker1")) < 5e6
    )  # one host, one clock: ns of error
    pipe.close()
    report = Report(worker="w", spans=[("F", 0, 0, 5_000_000_100, 5_000_000_200, -1)])
    span = tracing.spans({"w": report}, {"w": 5_000_000_000}, 3)[0]
    assert (span.start, span.end, span.step) == (pytest.approx(1e-7), pytest.approx(2e-7), 3)
