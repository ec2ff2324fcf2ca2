"""A timeline as text, one line per worker."""

from __future__ import annotations

from collections.abc import Sequence

from rpcpipe.schedules.spans import Span, Spans

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_FILL = {"F": "─", "B": "═", "I": "~", "W": "▒", "U": "█"}
LEGEND = {"F": "─ forward", "B": "═ backward", "I": "~ input gradient", "W": "▒ weight gradient", "U": "█ update"}


def to_text(timelines: Sequence[Spans], width: int = 100) -> str:
    """Return one line per worker; an action is its micro-batch (base 36, last digit) and a filling by kind.

    Where an action is one column wide, the micro-batch wins for forwards and the filling for the rest.
    """
    margin = max(len(f"worker {timeline.workers - 1} ") for timeline in timelines)
    columns = max(10, width - margin - 2)
    scale = min(_scale(timeline, columns) for timeline in timelines)
    parts = []
    for timeline in timelines:
        if len(timelines) > 1:
            parts.append(timeline.name + ":")
        parts += [*_rows(timeline, margin, columns, scale), _figures(timeline)]
    return "\n".join(parts)


def _rows(timeline: Spans, margin: int, columns: int, scale: float) -> list[str]:
    rows = [[" "] * (columns + 1) for _ in range(timeline.workers)]
    start = timeline.start
    for span in timeline.spans:
        if span.end > span.start:
            _draw(rows[span.worker], span, start, scale)
    return [
        f"worker {worker}".ljust(margin) + "|" + "".join(cells[: columns + 1]).rstrip()
        for worker, cells in enumerate(rows)
    ]


def _figures(timeline: Spans) -> str:
    kinds = {span.kind for span in timeline.spans if span.end > span.start}
    legend = ", ".join(text for kind, text in LEGEND.items() if kind in kinds)
    peaks = timeline.peak_in_flight
    shown = " ".join(map(str, peaks)) if len(peaks) <= 16 else f"{min(peaks)} to {max(peaks)}"
    return f"{legend}; makespan {timeline.makespan:.4g}, bubble {timeline.bubble:.1%}, peak in flight {shown}"


def _scale(timeline: Spans, columns: int) -> float:
    """Return columns per second: such that the shortest action has whole columns, where that fits."""
    makespan = timeline.makespan
    if not makespan:
        return 1.0
    shortest = min((span.end - span.start for span in timeline.spans if span.end > span.start), default=0.0)
    if shortest > 0:
        whole = int(columns / (makespan / shortest))
        if whole >= 1 and whole * makespan / shortest > 0.5 * columns:
            return whole / shortest
    return columns / makespan


def _draw(cells: list[str], span: Span, origin: float, scale: float) -> None:
    first = round((span.start - origin) * scale)
    last = max(first + 1, round((span.end - origin) * scale))
    cells[first:last] = [_FILL.get(span.kind, "?")] * (last - first)
    if span.chunk >= 0 and (last - first > 1 or span.kind == "F"):
        cells[first] = _DIGITS[span.chunk % 36]
