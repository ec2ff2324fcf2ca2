from __future__ import annotations

import pytest

import rpcpipe as rp
from rpcpipe.schedules import Action

PICTURES = {
    "gpipe": """
worker 0 |0─1─2─3─4─5─6─7─                  0═══1═══2═══3═══4═══5═══6═══7═══
worker 1 |  0─1─2─3─4─5─6─7─            0═══1═══2═══3═══4═══5═══6═══7═══
worker 2 |    0─1─2─3─4─5─6─7─      0═══1═══2═══3═══4═══5═══6═══7═══
worker 3 |      0─1─2─3─4─5─6─7─0═══1═══2═══3═══4═══5═══6═══7═══
─ forward, ═ backward; makespan 33, bubble 27.3%, peak in flight 8 8 8 8""",
    "1f1b": """
worker 0 |0─1─2─3─            0═══4─1═══5─2═══6─3═══7─4═══  5═══  6═══  7═══
worker 1 |  0─1─2─        0═══3─1═══4─2═══5─3═══6─4═══7─5═══  6═══  7═══
worker 2 |    0─1─    0═══2─1═══3─2═══4─3═══5─4═══6─5═══7─6═══  7═══
worker 3 |      0─0═══1─1═══2─2═══3─3═══4─4═══5─5═══6─6═══7─7═══
─ forward, ═ backward; makespan 33, bubble 27.3%, peak in flight 4 3 2 1""",
}


@pytest.mark.parametrize("name", PICTURES)
def test_drawn_as_in_the_source_document(name: str) -> None:
    assert "\n" + rp.schedules.get(name, 4, 8).simulate().to_text() == PICTURES[name]


@pytest.mark.parametrize("name", rp.schedules.names())
@pytest.mark.parametrize("workers", range(1, 9))
def test_every_schedule_is_valid(name: str, workers: int) -> None:
    for chunks in range(1, 25):
        rp.schedules.get(name, workers, chunks).validate()


@pytest.mark.parametrize("text", ["", "F0", "0F", "0X1", "aF1", "0F1F", "-1F0"])
def test_nonsense_is_no_action(text: str) -> None:
    with pytest.raises(rp.ScheduleError, match="is no action"):
        Action.parse(text)


def test_csv_both_ways() -> None:
    schedule = rp.schedules.get("1f1b", 3, 5)
    assert schedule.to_csv().splitlines()[2] == "2F0,2B0,2F1,2B1,2F2,2B2,2F3,2B3,2F4,2B4"
    assert rp.Schedule.from_csv(schedule.to_csv()).actions == schedule.actions


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
        (("zigzag", 2, 2), "unknown schedule 'zigzag'; known are naive, gpipe, 1f1b"),
        (("1f1b", 0, 2), "at least 1, not 0"),
        (("1f1b", 2, 0), "at least 1"),
        (("gpipe", 2, 2, 2), "one stage per worker"),
    ],
)
def test_undefined_sizes_are_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(rp.ScheduleError, match=message):
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
    with pytest.raises(rp.ScheduleError):
        rp.bubble_fraction(0, 1)
    with pytest.raises(rp.ScheduleError):
        rp.optimal_microbatches(4, 1.0)
