"""Timelines as text, as pictures and as a trace; several in one, on one scale of time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rpcpipe.schedules.render.perfetto import to_chrome
from rpcpipe.schedules.render.text import to_text
from rpcpipe.schedules.timeline import Timeline

__all__ = ["save", "to_chrome", "to_text"]


def save(timelines: Sequence[Timeline], path: Path) -> None:
    """Write ``path`` in the format of its suffix; raises ValueError for an unknown one."""
    if path.suffix == ".json":
        path.write_text(to_chrome(timelines), encoding="utf-8")
    elif path.suffix == ".html":
        from rpcpipe.schedules.render.html import to_html

        path.write_text(to_html(timelines), encoding="utf-8")
    elif path.suffix in (".svg", ".png"):
        from rpcpipe.schedules.render.plot import draw

        draw(timelines, path)
    else:
        raise ValueError(f"{path.name}: write .json, .html, .svg or .png")
