"""A run's state as text, for a terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from rpcpipe import _tables
from rpcpipe.schedules.render import to_text
from rpcpipe.view.source import unpacked

_BARS = "▁▂▃▄▅▆▇█"
_EVENTS = 8
_UNKNOWN = "?"
_WORKERS = ("worker", "host:pid", "device", "stages", "busy", "memory", "tasks done", "now")


def render(content: Mapping[str, Any], width: int = 100) -> str:
    """Return a message of a source as lines of at most ``width`` characters where that is possible."""
    parts = [
        f"{content['title']}  [{content['state']}]",
        _figures(content["figures"]),
        *_charts(content, width),
    ]
    if timelines := content.get("timelines"):
        parts += ["", to_text([unpacked(one) for one in timelines], width)]
    if workers := content["workers"]:
        parts += ["", _tables.text(_WORKERS, [_worker(one, content["now"]) for one in workers])]
    if content["stages"]["rows"]:
        parts += ["", _tables.text(*_stages(content))]
    if events := content["events"]:
        parts += ["", *(f"{_clock(one['time'])}  {one['kind']}: {one['what']}" for one in events[-_EVENTS:])]
    return "\n".join(line[:width] for part in parts for line in part.splitlines() or [""])


def _figures(figures: Mapping[str, Any]) -> str:
    if not figures:
        return "no step yet"
    seconds, bubble = figures.get("seconds"), figures.get("bubble")
    texts = [
        f"step {figures['step']}", f"loss {_number(figures['loss'])}", f"gradient norm {_number(figures['grad_norm'])}",
        f"{_number(figures.get('throughput'))} {_rate(figures)}",
        f"{_UNKNOWN if seconds is None else f'{seconds * 1e3:.1f}'} ms",
        f"bubble {_UNKNOWN if bubble is None else f'{bubble:.1%}'}",
    ]  # fmt: skip
    texts += [f"{name} {_number(value)}" for name, value in (figures.get("metrics") or {}).items()]
    return ", ".join(texts) + ("" if figures.get("applied", True) else ", not applied")


def _rate(figures: Mapping[str, Any]) -> str:
    """Return the unit of the throughput."""
    return "tokens/s" if figures.get("tokens") else "samples/s"


def _number(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.4g}"


def _charts(content: Mapping[str, Any], width: int) -> list[str]:
    """Return a line for each figure over the steps: its first and last value around bars; none below two steps."""
    lines = []
    for name, index in (("loss", 1), ("gradient norm", 2), (_rate(content["figures"]), 5)):
        values = [point[index] for point in content["points"] if point[index] is not None]
        if len(values) > 1:
            first, last = _number(values[0]), _number(values[-1])
            lines.append(f"{name:<13} {first:>9} {bars(values, max(10, width - 36))} {last}")
    return lines


def bars(values: Sequence[float], width: int) -> str:
    """Return ``values`` as at most ``width`` bars from the least to the greatest, each the mean of its share."""
    count = min(width, len(values))
    edges = [round(index * len(values) / count) for index in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    least, spread = min(means), max(means) - min(means)
    return "".join(_BARS[round((mean - least) / spread * (len(_BARS) - 1)) if spread else 0] for mean in means)


def _worker(worker: Mapping[str, Any], now: float) -> list[str]:
    busy, heard = worker["busy"], worker["heard"]
    late = f", {now - heard:.0f} s ago" if heard is not None and now - heard > 2 else ""
    return [
        worker["name"], worker["place"], worker["device"], ", ".join(map(str, worker["stages"])) or "-",
        "-" if busy is None else f"{busy:.1%}",
        _tables.mebibytes(worker["memory"]) if worker["memory"] else _UNKNOWN, str(worker["tasks"]),
        worker["state"] + (" (spare)" if worker["spare"] else "") + late,
    ]  # fmt: skip


def _stages(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the table of stages, with their peaks of the last step where there is one row per stage."""
    header, rows = list(content["stages"]["header"]), [list(row) for row in content["stages"]["rows"]]
    peaks = content["figures"].get("peak_activation_bytes") or []
    if len(peaks) == len(rows):
        header.append("peak activations")
        rows = [[*row, _tables.mebibytes(peak)] for row, peak in zip(rows, peaks, strict=True)]
    return header, rows


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds))
