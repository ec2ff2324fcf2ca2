from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import pytest

import rpcpipe as rp
from rpcpipe.schedules import Action

PICTURES = {
    # SEED: GPipe and 1F1B, 4 stages, 8 micro-batches.
    ("gpipe", 4, 8, 1): """
worker 0 |0─1─2─3─4─5─6─7─                  0═══1═══2═══3═══4═══5═══6═══7═══
worker 1 |  0─1─2─3─4─5─6─7─            0═══1═══2═══3═══4═══5═══6═══7═══
worker 2 |    0─1─2─3─4─5─6─7─      0═══1═══2═══3═══4═══5═══6═══7═══
worker 3 |      0─1─2─3─4─5─6─7─0═══1═══2═══3═══4═══5═══6═══7═══
─ forward, ═ backward; makespan 33, bubble 27.3%, peak in flight 8 8 8 8""",
    ("1f1b", 4, 8, 1): """
worker 0 |0─1─2─3─            0═══4─1═══5─2═══6─3═══7─4═══  5═══  6═══  7═══
worker 1 |  0─1─2─        0═══3─1═══4─2═══5─3═══6─4═══7─5═══  6═══  7═══
worker 2 |    0─1─    0═══2─1═══3─2═══4─3═══5─4═══6─5═══7─6═══  7═══
worker 3 |      0─0═══1─1═══2─2═══3─3═══4─4═══5─5═══6─6═══7─7═══
─ forward, ═ backward; makespan 33, bubble 27.3%, peak in flight 4 3 2 1""",
    # Narayanan et al. 2021, figure 4: four micro-batches at a time through a worker's two stages.
    ("interleaved", 4, 8, 2): """
worker 0 |01230123456   0═71═ 42═53═60═71═2═ 3═ 4═ 5═ 6═ 7═4═5═6═7═
worker 1 | 012301234  0═51═62═73═40═51═62═73═ 4═ 5═ 6═ 7═4═5═6═7═
worker 2 |  0123012 0═31═42═53═60═71═42═53═64═75═ 6═ 7═4═5═6═7═
worker 3 |   012300═11═22═33═40═51═62═73═44═55═66═77═4═5═6═7═
─ forward, ═ backward; makespan 57, bubble 15.8%, peak in flight 11 9 7 5""",
    # Qi et al. 2023, figure 2 (top): weight gradients in the drain.
    ("zb-h1", 4, 8, 1): """
worker 0 |0──1──2──3──         0~~0▒▒4──1~~1▒▒5──2~~2▒▒6──3~~3▒▒7──4~~4▒▒5~~5▒▒6~~6▒▒7~~7▒▒
worker 1 |   0──1──2──      0~~3──1~~0▒▒4──2~~1▒▒5──3~~2▒▒6──4~~3▒▒7──5~~4▒▒6~~5▒▒7~~6▒▒7▒▒
worker 2 |      0──1──   0~~2──1~~3──2~~0▒▒4──3~~1▒▒5──4~~2▒▒6──5~~3▒▒7──6~~4▒▒7~~5▒▒6▒▒7▒▒
worker 3 |         0──0~~1──1~~2──2~~3──3~~0▒▒4──4~~1▒▒5──5~~2▒▒6──6~~3▒▒7──7~~4▒▒5▒▒6▒▒7▒▒
─ forward, ~ input gradient, ▒ weight gradient; makespan 27, bubble 11.1%, peak in flight 4 4 4 4""",
}


@pytest.mark.parametrize("sizes", PICTURES)
def test_drawn_as_in_the_papers(sizes: tuple[str, int, int, int]) -> None:
    assert "\n" + rp.schedules.get(*sizes).simulate().to_text() == PICTURES[sizes]


@pytest.mark.parametrize("name", rp.schedules.names())
@pytest.mark.parametrize("workers", range(1, 9))
def test_every_schedule_is_valid_or_refused_with_the_reason(name: str, workers: int) -> None:
    defined, reasons = 0, set()
    for chunks in range(1, 25):
        for virtual in range(1, 5):
            try:
                schedule = rp.schedules.get(name, workers, chunks, virtual)
            except rp.ScheduleError as error:
                reasons.add(str(error))
                continue
            schedule.validate()
            defined += 1
    assert all("per worker" in reason or "needs at least" in reason for reason in reasons)
    loops = 3 if name in ("interleaved", "looped-bfs") else 2 if name in ("zb-v", "dualpipe-v") else 1
    fewest = {"dualpipe-v": 2 * workers, "pipedream-2bw": workers}.get(name, 1)
    assert defined == loops * max(0, 25 - fewest)


def test_streams_are_the_drawn_schedule_batch_after_batch() -> None:
    """Without a flush: every worker's order is the beginning of any longer stream's, but for the drain."""
    for name in ("pipedream", "pipedream-2bw"):
        for workers in range(1, 6):
            short, long = (rp.schedules.streamed(name, workers, 6, batches).validate() for batches in (2, 3))
            for rank, (a, b) in enumerate(zip(short.actions, long.actions, strict=True)):
                until = a.index(rp.schedules.Action("F", rank, 11)) + 1
                assert a[:until] == b[:until]
                assert [action for action in b if action.chunk < 12] == list(a)
            assert rp.schedules.streamed(name, workers, 6, 1).actions == rp.schedules.get(name, workers, 6).actions
            updates = [action.chunk for action in short.actions[0] if action.kind == "U"]
            assert updates == (list(range(12)) if name == "pipedream" else [5, 11])
    with pytest.raises(rp.ScheduleError, match="'1f1b' flushes after every batch; pipedream and pipedream-2bw do not"):
        rp.schedules.streamed("1f1b", 2, 4, 2)


def test_closed_forms_at_unit_costs() -> None:
    """F = I = W = 1 and B = 2, from the papers' tables."""
    for p in range(1, 9):
        for m in range(1, 25):
            line = {name: rp.schedules.get(name, p, m).simulate() for name in ("gpipe", "1f1b", "eager-1f1b", "zb-h1")}
            assert line["gpipe"].makespan == line["1f1b"].makespan == line["eager-1f1b"].makespan == (m + p - 1) * 3
            assert line["gpipe"].peak_in_flight == (m,) * p
            assert line["1f1b"].peak_in_flight == tuple(min(m, p - r) for r in range(p))
            assert line["eager-1f1b"].peak_in_flight == tuple(min(m, 2 * (p - r) - 1) for r in range(p))
            if m >= p:
                assert line["zb-h1"].makespan == m * 3 + (p - 1)
                assert line["zb-h1"].peak_in_flight == (p,) * p
            zb_v = rp.schedules.get("zb-v", p, m).simulate()
            assert zb_v.peak_in_flight == tuple(min(2 * p, 2 * m, m + r + 1) for r in range(p))
            if m >= 2 * p - 1:
                assert zb_v.makespan == 2 * 3 * m + (p - 1)
            longest = math.ceil(m / max(1, m // p))
            for v in (2, 3, 4):
                looped = rp.schedules.get("interleaved", p, m, v).simulate()
                assert looped.makespan == (v * max(m, p) + min(m, p) - 1) * 3
                assert looped.peak_in_flight == tuple(min(v * m, (v - 1) * longest + 2 * (p - r) - 1) for r in range(p))
                assert rp.schedules.get("looped-bfs", p, m, v).simulate().makespan == looped.makespan


def test_a_whole_forward_and_backward_are_paired_in_dualpipe_v() -> None:
    row = rp.schedules.get("dualpipe-v", 4, 24).actions[1]
    steady = row[len(row) // 3 : len(row) // 2]
    kinds = "".join(action.kind for action in steady)
    assert "FBFBFBFB" in kinds
    assert all(a.chunk != b.chunk for a, b in pairwise(steady))


@pytest.mark.parametrize("name", rp.schedules.names())
def test_consumer_is_the_inverse_of_upstream(name: str) -> None:
    schedule = rp.schedules.get(name, 3, 7, rp.schedules.fewest_virtual_stages(name))
    actions = [action for row in schedule.actions for action in row]
    consumers = {schedule.consumer(action): action for action in actions if schedule.consumer(action)}
    upstreams = {action: schedule.upstream(action) for action in actions if schedule.upstream(action)}
    assert consumers == upstreams


@pytest.mark.parametrize("text", ["", "F0", "0F", "0X1", "aF1", "0F1F", "-1F0"])
def test_nonsense_is_no_action(text: str) -> None:
    with pytest.raises(rp.ScheduleError, match="is no action"):
        Action.parse(text)


@pytest.mark.parametrize("name", rp.schedules.names())
def test_a_truncated_schedule_is_valid(name: str) -> None:
    full = rp.schedules.get(name, 3, 7, rp.schedules.fewest_virtual_stages(name))
    for chunks in range(1, 8):
        assert full.truncated(chunks).validate().chunks == chunks
    assert full.truncated(7).actions == full.actions


def test_csv_is_what_torch_reads() -> None:
    """torch.distributed.pipelining parses our cells, and we its compute-only ones."""
    from torch.distributed.pipelining.schedules import _Action

    for name in ("1f1b", "zb-h1", "interleaved"):
        schedule = rp.schedules.get(name, 3, 5, rp.schedules.fewest_virtual_stages(name))
        for row, actions in zip(schedule.to_csv().splitlines(), schedule.actions, strict=True):
            for cell, action in zip(row.split(","), actions, strict=True):
                theirs = _Action.from_str(cell)
                assert theirs is not None
                assert (theirs.stage_index, theirs.microbatch_index) == (action.stage, action.chunk)
                assert repr(theirs) == cell
        assert rp.Schedule.from_csv(schedule.to_csv()).actions == schedule.actions


def test_csv_both_ways() -> None:
    schedule = rp.schedules.get("1f1b", 3, 5)
    assert schedule.to_csv().splitlines()[2] == "2F0,2B0,2F1,2B1,2F2,2B2,2F3,2B3,2F4,2B4"
    assert rp.Schedule.from_csv(schedule.to_csv()).actions == schedule.actions


def test_a_schedule_of_ones_own_from_a_generator() -> None:
    def lazy(rank: int) -> Iterator[Action]:
        yield Action("F", rank, 0)
        yield Action("I", rank, 0)
        yield Action("W", rank, 0)

    schedule = rp.Schedule.from_actions((lazy(rank) for rank in range(3)), name="lazy")
    assert (schedule.workers, schedule.stages, schedule.chunks) == (3, 3, 1)
    assert str(schedule.actions[1][2]) == "1W0"


def test_a_deadlock_is_named() -> None:
    with pytest.raises(rp.ScheduleError, match="worker 0 stands at 0B0 and waits for 1B0"):
        rp.Schedule.from_csv("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0F0,0B0\n", "0F0 more than once"),
        ("0F0\n1F0,1B0\n", "stage 0, micro-batch 0 has"),
        ("0F0,0B0,1F0,1B0\n1F1\n", "stage 1 appears on workers 0 and 1"),
        ("0F0,0F1,0B1,0B0\n", "ascending"),
        ("1F0,1B0\n", "without gaps"),
        ("0F0,0I0\n", "needs F and either B or I and W"),
    ],
)
def test_broken_schedules_are_refused(text: str, message: str) -> None:
    with pytest.raises(rp.ScheduleError, match=message):
        rp.Schedule.from_csv(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gpipe", 2, 2, 2), "has 1 stage per worker; virtual_stages=2"),
        (("interleaved", 2, 2), "needs 2 or more stages per worker"),
        (("zb-v", 2, 2, 3), "has 2 stages per worker"),
        (("dualpipe-v", 4, 7), "needs at least 8 micro-batches on 4 workers, not 7"),
    ],
)
def test_undefined_sizes_are_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(rp.ScheduleError, match=message):
        rp.schedules.get(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("zigzag", 2, 2), "unknown schedule 'zigzag'; known are naive, gpipe, 1f1b"),
        (("1f1b", 0, 2), "at least 1, not 0"),
        (("1f1b", 2, 0), "at least 1"),
    ],
)
def test_names_and_numbers_that_no_schedule_has_are_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(rp.ArgumentError, match=message):
        rp.schedules.get(*arguments)  # type: ignore[arg-type]


def test_the_source_documents_numbers() -> None:
    assert [rp.optimal_microbatches(k) for k in (2, 4, 8, 16)] == [9, 27, 63, 135]
    for stages, chunks, expected in [(4, 8, 3 / 11), (4, 16, 3 / 19), (8, 16, 7 / 23)]:
        assert rp.bubble_fraction(stages, chunks) == pytest.approx(expected, abs=0)
        for name in ("gpipe", "1f1b"):
            assert rp.schedules.get(name, stages, chunks).simulate().bubble == pytest.approx(expected, abs=1e-12)
    assert rp.schedules.get("naive", 4, 8).simulate().bubble == pytest.approx(0.75)
    peak = rp.schedules.get("1f1b", 4, 16).simulate().peak_in_flight[0]
    assert 1 - peak / 16 == 0.75  # 75 % less than gpipe's 16


def test_bad_formula_arguments() -> None:
    with pytest.raises(rp.ArgumentError):
        rp.bubble_fraction(0, 1)
    with pytest.raises(rp.ArgumentError):
        rp.optimal_microbatches(4, 1.0)


@pytest.mark.parametrize("name", rp.schedules.names())
def test_what_a_search_is_told_of_a_schedule_is_so(name: str) -> None:
    virtual, traits = rp.schedules.fewest_virtual_stages(name), rp.schedules.traits(name)
    schedule = rp.schedules.get(name, 4, 32, virtual)
    timeline = schedule.simulate()
    assert traits.splits == any(action.kind in "IW" for row in schedule.actions for action in row)
    assert traits.serial == (timeline.makespan == pytest.approx(sum(timeline.busy)))
    assert traits.keeps_all == (max(timeline.peak_in_flight) == 32 * virtual)
    assert (name in rp.schedules.planned()) == (traits.simplicity is not None) == (not schedule.asynchronous)


def test_planned_schedules_come_in_order_of_simplicity() -> None:
    ranks = [rp.schedules.traits(name).simplicity for name in rp.schedules.planned()]
    assert ranks == list(range(9))
    assert rp.schedules.planned()[0] == "1f1b"
