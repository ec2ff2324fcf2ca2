from __future__ import annotations

import pytest

import rpcpipe as rp
from rpcpipe import Action, Costs


def test_transfers_take_latency_and_bandwidth_between_workers_only() -> None:
    schedule = rp.schedules.get("gpipe", 2, 1)
    free = schedule.simulate(Costs(forward=2, input_gradient=3, weight_gradient=0)).makespan
    costly = schedule.simulate(
        Costs(forward=2, input_gradient=3, weight_gradient=0, latency=0.5, bandwidth=4, output_bytes=6)
    ).makespan
    assert free == 10
    assert costly == 10 + 2 * (0.5 + 6 / 4)  # one activation there, one gradient back


def test_costs_per_stage_and_optimizer() -> None:
    schedule = rp.schedules.get("1f1b", 2, 2)
    timeline = schedule.simulate(Costs(forward=[1, 2], input_gradient=[1, 2], weight_gradient=[1, 2], optimizer=5))
    assert [span.kind for span in timeline.spans].count("U") == 2
    # Stage 1 is the bottleneck: 1 + 2 × 6 before its last backward ends, then stage 0's backward.
    assert timeline.makespan == 1 + 12 + 2 + 5
    with pytest.raises(rp.ScheduleError, match="3 entries for 2 stages"):
        schedule.simulate(Costs(forward=[1, 2, 3]))


@pytest.mark.parametrize("name", rp.schedules.names())
def test_predicted_spans_respect_dependencies_and_workers(name: str) -> None:
    schedule = rp.schedules.get(name, 4, 7)
    timeline = schedule.simulate(Costs(forward=1.5, latency=0.25))
    end = {Action(s.kind, s.stage, s.chunk): s.end for s in timeline.spans}  # type: ignore[arg-type]
    free = [0.0] * 4
    for span in timeline.spans:
        assert span.start >= free[span.worker]
        free[span.worker] = span.end
        for needed in schedule.dependencies(Action(span.kind, span.stage, span.chunk)):  # type: ignore[arg-type]
            assert span.start >= end[needed]


def test_an_empty_timeline_has_no_bubble() -> None:
    assert rp.Timeline([], workers=2).bubble == 0.0
    assert rp.Timeline([], workers=2).makespan == 0.0
