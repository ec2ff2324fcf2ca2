"""Where a view's figures come from, and the message that a page or a terminal gets of them."""

from __future__ import annotations

import json
import time
from typing import Any, Protocol

from rpcpipe.schedules import Span, Timeline
from rpcpipe.view.history import History

# The spans of a timeline that a page draws: of a longer one the beginning.
SPANS = 4000


class Source(Protocol):
    """A run: a live pipeline, or a file. ``history``: its steps. ``version`` grows with every new timeline."""

    history: History
    version: int

    def refresh(self) -> None:
        """Look for steps that are new."""
        ...

    def state(self) -> dict[str, Any]:
        """Return what holds now, fit for JSON: title, figures of the last step, workers, stages, events."""
        ...

    def timelines(self) -> list[Timeline]:
        """Return the last step's timelines, the planned one before the measured one; as many as there are."""
        ...


def message(source: Source, cursor: int = 0, version: int = -1) -> tuple[str, int, int]:
    """Return what is new, as JSON, with the cursor and the version for the next call; without them, everything.

    To be called on the view's own thread: it may take milliseconds.
    """
    source.refresh()
    points, later = source.history.since(cursor)
    newest = source.version
    content: dict[str, Any] = {**source.state(), "full": cursor == 0, "points": points, "now": time.time()}
    if newest != version:
        content["timelines"] = [packed(timeline) for timeline in source.timelines()]
    return json.dumps(content, allow_nan=False), later, newest


def packed(timeline: Timeline) -> dict[str, Any]:
    """Return a timeline fit for JSON, in seconds from its start: the first ``SPANS`` spans, and figures of all."""
    start, spans = timeline.start, [span for span in timeline.spans if span.end > span.start]
    shown = sorted(spans, key=lambda span: span.start)[:SPANS]
    return {
        "name": timeline.name, "workers": timeline.workers, "makespan": timeline.makespan, "bubble": timeline.bubble,
        "count": len(spans),
        "spans": [
            [span.worker, span.kind, span.stage, span.chunk, round(span.start - start, 7), round(span.end - start, 7)]
            for span in shown
        ],
    }  # fmt: skip


def unpacked(content: dict[str, Any]) -> Timeline:
    """Return the timeline that ``packed`` returned."""
    return Timeline((Span(*span) for span in content["spans"]), workers=content["workers"], name=content["name"])
