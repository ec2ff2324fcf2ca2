from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import rpcpipe as rp
from rpcpipe.schedules import Costs
from rpcpipe.schedules.render import to_chrome


def planned(name: str = "zb-v", latency: float = 0.3) -> rp.schedules.Timeline:
    virtual = rp.schedules.fewest_virtual_stages(name)
    return rp.schedules.get(name, 3, 6, virtual).simulate(Costs(latency=latency, optimizer=1.0))


def tracks(events: list[dict[str, Any]]) -> dict[tuple[int, int], list[dict[str, Any]]]:
    found: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for event in events:
        if event["ph"] == "X":
            found.setdefault((event["pid"], event["tid"]), []).append(event)
    return found


@pytest.mark.parametrize("name", rp.schedules.names())
def test_the_trace_has_no_overlaps_and_its_arrows_end_in_slices(name: str) -> None:
    timelines = [planned(name), planned("1f1b")]
    events = json.loads(to_chrome(timelines))["traceEvents"]
    by_track = tracks(events)
    for slices in by_track.values():
        slices.sort(key=lambda event: event["ts"])
        for before, after in pairwise(slices):
            assert before["ts"] + before["dur"] <= after["ts"] + 1e-6
    named = {(e["pid"], e["tid"]) for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    assert set(by_track) <= named
    starts, ends = ({e["id"]: e for e in events if e["ph"] == phase} for phase in "sf")
    assert starts.keys() == ends.keys()
    assert len(starts) == sum(len(timeline.transfers) for timeline in timelines)
    for arrow in (*starts.values(), *ends.values()):
        slices = by_track[arrow["pid"], arrow["tid"]]
        assert any(e["ts"] - 1e-6 <= arrow["ts"] <= e["ts"] + e["dur"] + 1e-6 for e in slices)


def test_waits_fill_the_gaps() -> None:
    timeline = planned("1f1b")
    idle = sum(wait.end - wait.start for wait in timeline.waits())
    starts = [min(s.start for s in timeline.spans if s.worker == w) for w in range(3)]
    assert idle + sum(timeline.busy) + sum(starts) == pytest.approx(3 * timeline.makespan)


def test_files(tmp_path: Path) -> None:
    for suffix in ("json", "html", "svg", "png"):
        planned().save(tmp_path / f"x.{suffix}")
    assert ET.parse(tmp_path / "x.svg").getroot().tag.endswith("svg")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    html = (tmp_path / "x.html").read_text()
    HTMLParser().feed(html)
    assert html.count("<i style") == len(planned().spans)
    assert "http" not in html
    with pytest.raises(ValueError, match=r"write \.json, \.html, \.svg or \.png"):
        planned().save(tmp_path / "x.pdf")


def test_two_in_one_picture_on_one_scale(tmp_path: Path) -> None:
    slow = rp.schedules.get("1f1b", 3, 6).simulate(Costs(2.0, 2.0, 2.0))
    text = rp.schedules.compare(
        rp.schedules.get("1f1b", 3, 6).simulate(Costs(1.5, 1.5, 1.5)), slow, tmp_path / "both.html"
    )
    lines = text.splitlines()
    assert max(map(len, lines[:4] + lines[5:9])) <= 100
    assert len(lines) == 2 * (1 + 3 + 1)
    assert len(lines[1]) < len(lines[6])  # the quicker one is drawn shorter
    unit = rp.schedules.get("1f1b", 3, 6).simulate()
    long = rp.schedules.get("1f1b", 3, 6).simulate(Costs(0.001, 0.001, 0.001))
    stretched = rp.schedules.compare(unit, long, stretch=True).splitlines()
    assert stretched[1] == stretched[6]
    assert "stretched × 0.001" in stretched[0] + stretched[4]
    assert "stretched" not in rp.schedules.compare(unit, long)


def test_text_fits_any_width_and_size() -> None:
    for name, workers, chunks, width in [("naive", 8, 24, 100), ("gpipe", 2, 100, 80), ("1f1b", 12, 40, 60)]:
        lines = rp.schedules.get(name, workers, chunks).simulate().to_text(width).splitlines()
        assert max(map(len, lines[:-1])) <= width
        assert len(lines) == workers + 1
    assert "makespan 0" in rp.schedules.Timeline([], workers=2).to_text()


def test_what_takes_no_time_is_not_drawn() -> None:
    text = rp.schedules.get("pipedream", 4, 8).simulate().to_text()
    assert "█" not in text
    assert text == rp.schedules.get("1f1b", 4, 8).simulate().to_text()
    assert "█ update" in rp.schedules.get("pipedream", 4, 8).simulate(rp.schedules.Costs(optimizer=1)).to_text()


def test_a_notebook_shows_the_timeline_as_a_picture() -> None:
    timeline = rp.schedules.get("1f1b", 2, 3).simulate()
    picture = timeline._repr_html_()
    assert picture.count("<i style=") == len(timeline.spans)
    assert "bubble" in picture
    assert "body{" not in picture  # the styles are for the picture alone, not for the page that shows it
