"""A timeline as one HTML file without dependencies; hovering over a box shows its action and times."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from rpcpipe.schedules.render.plot import COLOURS
from rpcpipe.schedules.spans import Spans

_PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>body{{font:13px sans-serif;margin:2em}}</style>
{body}
"""
# Also shown inside of other pages, a notebook's: styles are named, and hold below the class alone.
_PICTURE = """<style>.rpcpipe-timeline .row{{position:relative;height:24px;background:#f2f2f2;
margin:2px 0 2px 80px}}
.rpcpipe-timeline .row b{{position:absolute;left:-80px;font-weight:normal;line-height:24px}}
.rpcpipe-timeline .row i{{position:absolute;top:1px;bottom:1px;color:#fff;font:10px/22px sans-serif;text-align:center;
overflow:hidden}}</style>
<div class="rpcpipe-timeline">
{body}
</div>"""


def to_page(timelines: Sequence[Spans]) -> str:
    """Return a page of its own with the pictures."""
    return _PAGE.format(title=escape(" and ".join(t.name for t in timelines)), body=to_html(timelines))


def to_html(timelines: Sequence[Spans]) -> str:
    """Return the pictures, to be put into a page; all timelines share one scale of time."""
    longest = max(timeline.makespan for timeline in timelines) or 1.0
    parts = []
    for timeline in timelines:
        figures = f"{timeline.name}: makespan {timeline.makespan:.4g}, bubble {timeline.bubble:.1%}"
        parts += [f"<h3>{escape(figures)}</h3>", *_rows(timeline, longest)]
    return _PICTURE.format(body="\n".join(parts))


def _rows(timeline: Spans, longest: float) -> list[str]:
    """Return one element per worker; ``longest``: the seconds that the whole width stands for."""
    rows: list[list[str]] = [[] for _ in range(timeline.workers)]
    start = timeline.start
    for span in timeline.spans:
        left, width = (span.start - start) / longest, (span.end - span.start) / longest
        what = f"{span.stage}{span.kind}{span.chunk}" if span.stage >= 0 else "update"
        tip = f"{what}: {span.start - start:.6g} to {span.end - start:.6g} ({span.end - span.start:.4g})"
        rows[span.worker].append(
            f'<i style="left:{left:.4%};width:{width:.4%};background:{COLOURS[span.kind]}" title="{tip}">'
            f"{span.chunk if span.chunk >= 0 else ''}</i>"
        )
    return [f'<div class="row"><b>worker {worker}</b>{"".join(row)}</div>' for worker, row in enumerate(rows)]
