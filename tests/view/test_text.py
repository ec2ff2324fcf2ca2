"""A run as text."""

from __future__ import annotations

import time
from typing import Any

import pytest

import rpcpipe as rp
from rpcpipe.view.source import packed
from rpcpipe.view.text import bars, render

FIGURES = {
    "step": 41, "loss": 0.51234, "grad_norm": 1.25, "seconds": 0.125, "samples": 64.0, "tokens": 0, "throughput": 512.0,
    "bubble": 0.25, "applied": True,
    "peak_activation_bytes": [2**20, 2**19],
}  # fmt: skip
WORKER = {
    "name": "worker0", "place": "host:7", "device": "cpu", "stages": [0], "busy": 0.75, "memory": 2**28, "tasks": 12,
    "state": "idle", "lost": False, "spare": False, "heard": 99.5,
}  # fmt: skip


def content(**changed: Any) -> dict[str, Any]:
    plain = {
        "title": "Pipeline(1f1b)", "state": "live", "figures": {}, "points": [], "workers": [], "events": [],
        "stages": {"header": [], "rows": []}, "now": 100.0,
    }  # fmt: skip
    return {**plain, **changed}


def test_before_the_first_step() -> None:
    assert render(content()) == "Pipeline(1f1b)  [live]\nno step yet"


def test_the_figures_of_a_step() -> None:
    [_, line] = render(content(figures=FIGURES)).splitlines()
    assert line == "step 41, loss 0.5123, gradient norm 1.25, 512 samples/s, 125.0 ms, bubble 25.0%"
    [_, line] = render(content(figures={**FIGURES, "loss": None, "throughput": None, "applied": False})).splitlines()
    assert render(content(figures={**FIGURES, "metrics": {"accuracy": 0.5}})).endswith("bubble 25.0%, accuracy 0.5")
    assert line == "step 41, loss ?, gradient norm 1.25, ? samples/s, 125.0 ms, bubble 25.0%, not applied"


def test_token_ids_have_tokens_per_second() -> None:
    points = [[step, None, None, 0.1, 0.5, 800.0, 0.0] for step in range(3)]
    text = render(content(figures={**FIGURES, "tokens": 100, "throughput": 800.0}, points=points))
    assert ", 800 tokens/s, 125.0 ms" in text
    assert "tokens/s            800 ▁▁▁ 800" in text
    assert "samples" not in text


def test_charts() -> None:
    points = [[step, 8.0 - step, None, 0.1, 0.5, 10.0, 0.0] for step in range(8)]
    lines = render(content(figures=FIGURES, points=points)).splitlines()
    assert lines[2:] == [
        "loss                  8 █▇▆▅▄▃▂▁ 1",
        "samples/s            10 ▁▁▁▁▁▁▁▁ 10",
    ]


@pytest.mark.parametrize("count", [1, 7, 100, 12345])
def test_bars_are_as_many_as_fit(count: int) -> None:
    found = bars(list(range(count)), 20)
    assert len(found) == min(count, 20)
    assert list(found) == sorted(found)


def test_the_plan_stands_above_what_was_measured() -> None:
    timeline = rp.schedules.get("1f1b", 2, 2).simulate()
    planned, measured = packed(timeline), packed(timeline)
    text = render(content(timelines=[{**planned, "name": "planned"}, {**measured, "name": "measured"}]), 80)
    rows = timeline.to_text(80).splitlines()
    assert text.splitlines()[3:] == ["planned:", *rows, "measured:", *rows]


def test_workers_and_stages() -> None:
    lost = {**WORKER, "name": "worker1", "stages": [1], "busy": None, "memory": 0, "state": "lost", "heard": 95.0}
    spare = {**WORKER, "name": "worker2", "stages": [], "busy": None, "spare": True, "heard": None}
    stages = {"header": ["stage", "worker"], "rows": [["0", "worker0"], ["1", "worker1"]]}
    text = render(content(figures=FIGURES, workers=[WORKER, lost, spare], stages=stages))
    assert text.splitlines()[2:] == [
        "",
        "  worker   host:pid  device  stages  busy   memory     tasks done  now",
        "  worker0  host:7    cpu     0       75.0%  256.0 MiB  12          idle",
        "  worker1  host:7    cpu     1       -      ?          12          lost, 5 s ago",
        "  worker2  host:7    cpu     -       -      256.0 MiB  12          idle (spare)",
        "",
        "  stage  worker   peak activations",
        "  0      worker0  1.0 MiB",
        "  1      worker1  0.5 MiB",
    ]


def test_the_newest_events_are_shown() -> None:
    events = [{"time": float(second), "kind": "saved", "what": f"run/{second}"} for second in range(20)]
    lines = render(content(events=events)).splitlines()[3:]
    assert lines == [f"{time.strftime('%H:%M:%S', time.localtime(s))}  saved: run/{s}" for s in range(12, 20)]


def test_no_line_is_wider_than_the_terminal() -> None:
    events = [{"time": 0.0, "kind": "died", "what": "x" * 500}]
    assert max(map(len, render(content(figures=FIGURES, workers=[WORKER], events=events), 40).splitlines())) == 40
