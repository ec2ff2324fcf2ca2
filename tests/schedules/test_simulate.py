from __future__ import annotations

import dataclasses
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rpcpipe as rp
from rpcpipe.schedules import Action, Costs, Span
from rpcpipe.schedules.shared_cores import simulate_shared


def test_transfers_take_latency_and_bandwidth_between_workers_only() -> None:
    schedule = rp.schedules.get("gpipe", 2, 1)
    free = schedule.simulate(Costs(forward=2, input_gradient=3, weight_gradient=0)).makespan
    costly = schedule.simulate(
        Costs(forward=2, input_gradient=3, weight_gradient=0, latency=0.5, bandwidth=4, output_bytes=6)
    ).makespan
    assert free == 10
    assert costly == 10 + 2 * (0.5 + 6 / 4)  # one activation there, one gradient back


def test_recomputation_begins_while_the_gradient_is_under_way() -> None:
    schedule = rp.schedules.get("gpipe", 2, 2)
    timeline = schedule.simulate(Costs(1, 1, 1, recompute_seconds=[1, 0]))
    assert timeline.makespan == schedule.simulate().makespan + 1  # stage 0's first one costs nothing
    late = [(span.start, span.end) for span in timeline.spans if (span.worker, span.kind) == (0, "B")]
    assert late == [(5, 7), (7, 10)]  # the second one's is part of its backward
    # A replay that has begun is finished, though the gradient came meanwhile.
    assert schedule.simulate(Costs(1, 1, 1, recompute_seconds=[10, 0])).makespan == 2 + 10 + 2 + 12


@pytest.mark.parametrize("name", rp.schedules.names())
@pytest.mark.parametrize("recompute", [0.0, [0.5, 0.0, 3.0] * 2])
def test_with_a_core_each_sharing_changes_nothing(name: str, recompute: float | list[float]) -> None:
    schedule = rp.schedules.get(name, 3, 7, rp.schedules.fewest_virtual_stages(name))
    recompute = recompute[: schedule.stages] if isinstance(recompute, list) else recompute
    costs = Costs(1.5, 0.7, 0.9, latency=0.25, recompute_seconds=recompute)
    alone, _, free = simulate_shared(schedule, dataclasses.replace(costs, cores=3), _durations(costs, schedule.stages))
    plain = schedule.simulate(costs)
    key = ["kind", "stage", "chunk", "start", "end"]
    for a, b in zip(sorted(alone), sorted(span._replace(version=-1) for span in plain.spans), strict=True):
        assert [getattr(a, name) for name in key] == pytest.approx([getattr(b, name) for name in key])
    assert max(free) == pytest.approx(plain.makespan)


def test_workers_share_cores() -> None:
    schedule = rp.schedules.get("gpipe", 4, 8)
    one = schedule.simulate(Costs(cores=1))
    assert one.makespan == pytest.approx(4 * 8 * 3)  # nothing but work
    two = schedule.simulate(Costs(cores=2))
    assert 4 * 8 * 3 / 2 < two.makespan < one.makespan
    # Two at a time: from the first forward's end on, until three stages have one backward left.
    assert two.makespan == pytest.approx(1 + (4 * 8 * 3 - 1 - 2) / 2 + 2, abs=2)
    rows = ((Action("B", 0, 0), Action("F", 0, 0)), (Action("F", 1, 0), Action("B", 1, 0)))
    broken = rp.Schedule("broken", 1, (0, 1), rows)
    with pytest.raises(rp.ScheduleError, match="can never finish"):
        broken.simulate(Costs(cores=1))


def _durations(costs: Costs, stages: int) -> dict[str, list[float]]:
    return {kind: [costs.of(kind, stage) for stage in range(stages)] for kind in "FBIWU"}


def test_costs_per_stage_and_optimizer() -> None:
    schedule = rp.schedules.get("1f1b", 2, 2)
    timeline = schedule.simulate(Costs(forward=[1, 2], input_gradient=[1, 2], weight_gradient=[1, 2], optimizer=5))
    assert [span.kind for span in timeline.spans].count("U") == 2
    # Stage 1 is the bottleneck: 1 + 2 × 6 before its last backward ends, then stage 0's backward.
    assert timeline.makespan == 1 + 12 + 2 + 5
    with pytest.raises(rp.ArgumentError, match="3 entries for 2 stages"):
        schedule.simulate(Costs(forward=[1, 2, 3]))


@pytest.mark.parametrize("name", rp.schedules.names())
def test_predicted_spans_respect_dependencies_and_workers(name: str) -> None:
    schedule = rp.schedules.get(name, 3, 7, rp.schedules.fewest_virtual_stages(name))
    timeline = schedule.simulate(Costs(forward=1.5, latency=0.25))
    end = {Action(s.kind, s.stage, s.chunk): s.end for s in timeline.spans}  # type: ignore[arg-type]
    free = [0.0] * 3
    for span in timeline.spans:
        assert span.start >= free[span.worker]
        free[span.worker] = span.end
        for needed in schedule.dependencies(Action(span.kind, span.stage, span.chunk)):  # type: ignore[arg-type]
            assert span.start >= end[needed]


@given(
    st.sampled_from(rp.schedules.names()),
    st.integers(1, 6),
    st.integers(1, 12),
    st.integers(1, 3),
    st.tuples(*[st.floats(0.1, 10)] * 3),
    st.floats(0, 5),
)
def test_validator_and_simulator_agree(
    name: str, workers: int, chunks: int, virtual: int, costs: tuple[float, float, float], latency: float
) -> None:
    try:
        schedule = rp.schedules.get(name, workers, chunks, virtual).validate()
    except rp.ScheduleError:
        return
    timeline = schedule.simulate(Costs(*costs, latency=latency))
    rows: list[list[Action]] = [[] for _ in range(workers)]
    for span in sorted(timeline.spans, key=lambda span: (span.start, span.end)):
        rows[span.worker].append(Action(span.kind, span.stage, span.chunk))  # type: ignore[arg-type]
    assert tuple(map(tuple, rows)) == schedule.actions
    path = rp.schedules.critical_path(timeline, schedule)
    assert path[0].start == 0.0
    assert path[-1].end == pytest.approx(timeline.makespan)
    assert all(a.end <= b.start + 1e-9 for a, b in pairwise(path))
    if latency == 0:
        assert sum(span.end - span.start for span in path) == pytest.approx(timeline.makespan)


def test_the_critical_path_of_gpipe() -> None:
    schedule = rp.schedules.get("gpipe", 2, 2)
    path = rp.schedules.critical_path(schedule.simulate(), schedule)
    names = [f"{span.stage}{span.kind}{span.chunk}" for span in path]
    assert names[0] == "0F0"
    assert names[-2:] == ["1B1", "0B1"]


def test_transfers_are_listed() -> None:
    timeline = rp.schedules.get("zb-v", 2, 4).simulate(Costs(latency=0.5))
    assert all(move.source != move.target and move.arrived == move.sent + 0.5 for move in timeline.transfers)
    assert len(timeline.transfers) == 2 * 2 * 4  # two crossings each way; the V's turn is local


def test_measured_costs_are_means_by_stage() -> None:
    timeline = rp.schedules.Timeline(
        [Span(0, "F", 0, 0, 0, 1), Span(0, "F", 0, 1, 1, 4), Span(0, "B", 0, 0, 4, 9), Span(1, "F", 1, 0, 1, 2)],
        workers=2,
    )
    costs = Costs.measured(timeline, 2)
    assert [costs.of("F", 0), costs.of("F", 1), costs.of("B", 0), costs.of("B", 1)] == [2, 1, 5, 0]


def test_large_schedules_are_quick() -> None:
    start = time.process_time()
    timeline = rp.schedules.get("1f1b", 64, 512).simulate()
    assert timeline.makespan == (512 + 63) * 3
    assert time.process_time() - start < 1.0


def test_an_empty_timeline_has_no_bubble() -> None:
    assert rp.schedules.Timeline([], workers=2).bubble == 0.0
    assert rp.schedules.Timeline([], workers=2).makespan == 0.0


def test_messages_and_actions_occupy_their_workers() -> None:
    """Two workers, one micro-batch: forward 2, whole backward 3 + 1, with every overhead of another size."""
    schedule = rp.schedules.get("gpipe", 2, 1)
    costs = Costs(2, 3, 1, latency=0.5, action_overhead=0.25, send_overhead=[1, 100], receive_overhead=0.125)
    timeline = schedule.simulate(costs)
    spans = {(span.kind, span.stage): (span.start, span.end) for span in timeline.spans}
    assert spans == {
        ("F", 0): (0, 2),
        ("F", 1): (2 + 1 + 0.5 + 0.125, 5.625),  # sent, on its way, received
        ("B", 1): (5.625 + 0.25, 9.875),
        ("B", 0): (9.875 + 1 + 0.5 + 0.125, 15.5),  # the gradient is as large as stage 0's output
    }
    assert [(move.sent, move.arrived) for move in timeline.transfers] == [(3, 3.5), (10.875, 11.375)]
    # While stage 0 has more to do, sending comes between its forwards, and receiving before its backwards.
    row = [span for span in rp.schedules.get("gpipe", 2, 2).simulate(costs).spans if span.worker == 0]
    assert [(span.kind, span.start) for span in row[:2]] == [("F", 0), ("F", 2 + 1 + 0.25)]


_RECOMPUTATION = 0.5


def some_costs(stages: int, sizes: tuple[float, float, float], overheads: tuple[float, float, float]) -> Costs:
    action, send, receive = overheads
    return Costs(
        *sizes, latency=0.25, recompute_seconds=[_RECOMPUTATION] * stages, action_overhead=action,
        send_overhead=[send * (1 + stage % 2) for stage in range(stages)], receive_overhead=receive,
    )  # fmt: skip


three = st.tuples(*[st.floats(0, 3)] * 3)
shapes = st.tuples(st.sampled_from(rp.schedules.names()), st.integers(1, 4), st.integers(1, 8))


def shaped(shape: tuple[str, int, int]) -> rp.Schedule:
    name, workers, chunks = shape
    chunks = max(chunks, rp.schedules.fewest_chunks(name, workers))
    return rp.schedules.get(name, workers, chunks, rp.schedules.fewest_virtual_stages(name))


@given(shapes, three, three, three)
def test_more_overhead_never_ends_sooner(
    shape: tuple[str, int, int],
    sizes: tuple[float, float, float],
    less: tuple[float, float, float],
    more: tuple[float, float, float],
) -> None:
    """Every worker keeps its order, so that the makespan is the longest path through durations that only grow."""
    schedule = shaped(shape)
    before = schedule.simulate(some_costs(schedule.stages, sizes, less))
    grown = (less[0] + more[0], less[1] + more[1], less[2] + more[2])
    after = schedule.simulate(some_costs(schedule.stages, sizes, grown))
    ends = {span[:4]: span.end for span in before.spans}
    assert all(span.end >= ends[span[:4]] - 1e-9 for span in after.spans)


@given(shapes, three, three)
def test_overheads_are_the_same_with_a_core_for_each_worker(
    shape: tuple[str, int, int], sizes: tuple[float, float, float], overheads: tuple[float, float, float]
) -> None:
    schedule = shaped(shape)
    costs = some_costs(schedule.stages, sizes, overheads)
    shared, transfers, ends = simulate_shared(
        schedule, dataclasses.replace(costs, cores=schedule.workers), _durations(costs, schedule.stages)
    )
    plain = schedule.simulate(costs)
    found = {span[:4]: (span.start, span.end) for span in shared}
    assert found.keys() == {span[:4] for span in plain.spans}
    for span in plain.spans:
        start, end = found[span[:4]]
        assert end == pytest.approx(span.end)
        # An input that comes when its recomputation could begin, but for rounding: it is the action's, or is before it.
        earlier = abs(start - span.start) == pytest.approx(_RECOMPUTATION) and span.kind in "BI"
        assert earlier or start == pytest.approx(span.start)
    arrivals = {move.producer: move.arrived for move in transfers}
    assert arrivals == pytest.approx({move.producer: move.arrived for move in plain.transfers})
    assert max(ends) == pytest.approx(plain.makespan)


def test_overheads_take_their_share_of_the_cores() -> None:
    schedule = rp.schedules.get("gpipe", 4, 8)
    costs = Costs(cores=1, action_overhead=0.25, send_overhead=0.5, receive_overhead=0.125)
    # One core: nothing but work. Nobody waits for what follows the last action, of stage 0.
    work = 4 * 8 * 3 + (2 * 4 * 8 - 1) * 0.25 + 2 * 3 * 8 * (0.5 + 0.125)
    assert schedule.simulate(costs).makespan == pytest.approx(work)


def test_without_overheads_nothing_is_charged() -> None:
    for name in rp.schedules.names():
        schedule = shaped((name, 3, 7))
        free = Costs(1.5, 0.7, 0.9)
        zero = dataclasses.replace(free, send_overhead=[0.0] * schedule.stages, latency=0.0)
        assert schedule.simulate(zero).spans == schedule.simulate(free).spans


def test_a_worker_updates_alone_after_its_own_last_action_and_what_that_sends() -> None:
    schedule = rp.schedules.get("gpipe", 2, 1)
    costs = Costs(2, 3, 1, send_overhead=0.5, action_overhead=0.25, optimizer=5, update_alone=True)
    # F on worker 0 until 2, sent until 2.5; F on worker 1 until 4.5, B from 4.75 to 8.75, sent until 9.25.
    alone = {s.worker: (s.start, s.end) for s in schedule.simulate(costs).spans if s.kind == "U"}
    assert alone == {1: (9.25, 14.25), 0: (9.25 + 4, 13.25 + 5)}
    gated = schedule.simulate(dataclasses.replace(costs, update_alone=False))
    assert {(s.start, s.end) for s in gated.spans if s.kind == "U"} == {(13.25, 18.25)}


@given(shapes, three, three, st.floats(0.1, 5), st.sampled_from([None, 1.0]))
def test_updating_alone_never_ends_later_and_moves_no_action(
    shape: tuple[str, int, int],
    sizes: tuple[float, float, float],
    overheads: tuple[float, float, float],
    optimizer: float,
    cores: float | None,
) -> None:
    schedule = shaped(shape)
    if schedule.asynchronous:
        return
    costs = dataclasses.replace(some_costs(schedule.stages, sizes, overheads), optimizer=optimizer, cores=cores)
    gated, alone = (schedule.simulate(dataclasses.replace(costs, update_alone=one)) for one in (False, True))
    assert [s for s in alone.spans if s.kind != "U"] == [s for s in gated.spans if s.kind != "U"]
    assert alone.makespan <= gated.makespan + 1e-9
    last = [max(s.end for s in alone.spans if s.worker == w and s.kind != "U") for w in range(schedule.workers)]
    assert all(s.start >= last[s.worker] for s in alone.spans if s.kind == "U")
