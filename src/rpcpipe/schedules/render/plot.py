"""A timeline as a picture, by matplotlib (the extra ``plot``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rpcpipe.errors import DependencyError
from rpcpipe.schedules.action import NAMES
from rpcpipe.schedules.spans import Spans

COLOURS = {"F": "#4c78a8", "B": "#f58518", "I": "#e45756", "W": "#72b7b2", "U": "#54a24b"}


def draw(timelines: Sequence[Spans], path: Path) -> None:
    """Write ``path`` (.svg or .png); raises DependencyError with the remedy where matplotlib is missing."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise DependencyError(
            "pictures need matplotlib: pip install '.[plot]' in a checkout; .html and .json do not"
        ) from error
    heights = [timeline.workers for timeline in timelines]
    figure = Figure(figsize=(12, 0.4 * sum(heights) + 1.1 * len(timelines)), layout="constrained")
    axes = figure.subplots(len(timelines), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axis, timeline in zip(axes[:, 0], timelines, strict=True):
        _draw_timeline(axis, timeline)
    kinds = {span.kind for timeline in timelines for span in timeline.spans}
    patches = [Patch(color=COLOURS[kind], label=name) for kind, name in NAMES.items() if kind in kinds]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "rpcpipe"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_timeline(axis: Any, timeline: Spans) -> None:
    """Draw a bar per span, with its micro-batch's number where the bar is wide enough."""
    origin, makespan = timeline.start, timeline.makespan
    for span in timeline.spans:
        length = span.end - span.start
        axis.barh(span.worker, length, left=span.start - origin, height=0.9, color=COLOURS[span.kind],
                  edgecolor="white", linewidth=0.4)  # fmt: skip
        if span.chunk >= 0 and length > 0.012 * makespan:
            axis.text(span.start - origin + length / 2, span.worker, str(span.chunk), ha="center", va="center",
                      fontsize=7, color="white")  # fmt: skip
    axis.set_yticks(range(timeline.workers), [f"worker {worker}" for worker in range(timeline.workers)])
    axis.invert_yaxis()
    axis.set_title(f"{timeline.name}: makespan {makespan:.4g}, bubble {timeline.bubble:.1%}", loc="left", fontsize=9)
