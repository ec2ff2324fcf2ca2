"""A Timeline as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rpcpipe.timeline import Span, Timeline

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_FILL = {"F": "─", "B": "═", "I": "~", "W": "▒", "U": "█"}
_LEGEND = {"F": "─ forward", "B": "═ backward", "I": "~ input gradient", "W": "▒ weight gradient", "U": "█ update"}


def to_text(timeline: Timeline, width: int = 100) -> str:
    """One line per worker; an action is its micro-batch (base 36, last digit) and a filling by kind.

    Where an action is one column wide, the micro-batch wins for forwards and the filling for the rest.
    """
    margin = len(f"worker {timeline.workers - 1} ")
    columns = max(10, width - margin - 2)
    scale = _scale(timeline, columns)
    lines = []
    for worker in range(timeline.workers):
        cells = [" "] * (columns + 1)
        for span in timeline.spans:
            if span.worker == worker:
                _draw(cells, span, timeline.start, scale)
        lines.append(f"worker {worker}".ljust(margin) + "|" + "".join(cells).rstrip())
    kinds = {span.kind for span in timeline.spans}
    legend = ", ".join(text for kind, text in _LEGEND.items() if kind in kinds)
    peaks = " ".join(map(str, timeline.peak_in_flight))
    lines.append(f"{legend}; makespan {timeline.makespan:.4g}, bubble {timeline.bubble:.1%}, peak in flight {peaks}")
    return "\n".join(lines)


def _scale(timeline: Timeline, columns: int) -> float:
    """Columns per unit of time: whole columns for the shortest action where they fit."""
    if not timeline.makespan:
        return 1.0
    shortest = min(span.end - span.start for span in timeline.spans)
    if shortest > 0:
        whole = int(columns / (timeline.makespan / shortest))
        if whole >= 1 and whole * timeline.makespan / shortest > 0.5 * columns:
            return whole / shortest
    return columns / timeline.makespan


def _draw(cells: list[str], span: Span, origin: float, scale: float) -> None:
    first = round((span.start - origin) * scale)
    last = max(first + 1, round((span.end - origin) * scale))
    fill = _FILL.get(span.kind, "?")
    cells[first:last] = [fill] * (last - first)
    if span.chunk >= 0 and (last - first > 1 or span.kind == "F"):
        cells[first] = _DIGITS[span.chunk % 36]
