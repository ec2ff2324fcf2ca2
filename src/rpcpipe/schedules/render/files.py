"""Timelines written to a file in the format of its suffix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rpcpipe.errors import ArgumentError
from rpcpipe.schedules.render.html import to_page
from rpcpipe.schedules.render.perfetto import to_chrome
from rpcpipe.schedules.render.plot import draw
from rpcpipe.schedules.spans import Spans


def save(timelines: Sequence[Spans], path: Path) -> None:
    """Write ``path`` in the format of its suffix.

    Raises ArgumentError for an unknown suffix, DependencyError where matplotlib is needed and missing.
    """
    if path.suffix == ".json":
        path.write_text(to_chrome(timelines), encoding="utf-8")
    elif path.suffix == ".html":
        path.write_text(to_page(timelines), encoding="utf-8")
    elif path.suffix in (".svg", ".png"):
        draw(timelines, path)
    else:
        raise ArgumentError(f"{path.name}: write .json, .html, .svg or .png")
