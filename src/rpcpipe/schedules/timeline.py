"""A timeline as users handle it, predicted by the simulator or measured on a run: shown, saved, compared."""

from __future__ import annotations

from pathlib import Path

from rpcpipe._arguments import require_count, require_flag, require_kind, require_path
from rpcpipe.schedules.render import save, to_html, to_text
from rpcpipe.schedules.spans import Spans

_WIDEST = 10_000  # columns of a text


class Timeline(Spans):
    """Spans and transfers of one step, or of several, with the figures computed from them.

    A traced timeline grows while its ``with`` block is open, so nothing is cached.
    """

    def __repr__(self) -> str:
        return (
            f"Timeline({self.name!r}, {len(self.spans)} spans on {self.workers} workers,"
            f" makespan {self.makespan:.4g}, bubble {self.bubble:.1%})"
        )

    def _repr_html_(self) -> str:
        return to_html([self])

    def to_text(self, width: int = 100) -> str:
        """Return the timeline as lines of at most ``width`` characters."""
        return to_text([self], require_count("width", width, _WIDEST))

    def save(self, path: str | Path) -> None:
        """Write a picture: .svg, .png (need matplotlib), .html, or .json for Perfetto and Chrome.

        Raises ArgumentError for another suffix, DependencyError where matplotlib is needed and missing.
        """
        save([self], require_path("path", path))


def compare(
    planned: Timeline,
    measured: Timeline,
    path: str | Path | None = None,
    *,
    width: int = 100,
    stretch: bool = False,
) -> str:
    """Return both timelines as one text on one scale of time; the picture is written to ``path`` if given.

    ``stretch``: ``planned`` is in other units (unit costs); it is drawn as long as the measured one, and its name says
    so.
    """
    for name, value in (("planned", planned), ("measured", measured)):
        require_kind(name, value, Timeline, "a Timeline")
    if require_flag("stretch", stretch) and planned.makespan:
        planned = _stretched(planned, measured.makespan / planned.makespan)
    if path is not None:
        save([planned, measured], require_path("path", path))
    return to_text([planned, measured], require_count("width", width, _WIDEST))


def _stretched(timeline: Timeline, factor: float) -> Timeline:
    return Timeline(
        (span._replace(start=span.start * factor, end=span.end * factor) for span in timeline.spans),
        (move._replace(sent=move.sent * factor, arrived=move.arrived * factor) for move in timeline.transfers),
        workers=timeline.workers,
        name=f"{timeline.name} (stretched × {factor:.3g})",
    )
