"""Small tables, for a terminal and for a notebook."""

from __future__ import annotations

import html
from collections.abc import Sequence


def text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; no line ends in blanks."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    return "\n".join("  " + line.rstrip() for line in lines)


def markup(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as HTML, every cell escaped."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<b>{html.escape(title)}</b><table>{line(header, 'th')}{body}</table>"


def mebibytes(count: float) -> str:
    """``count`` bytes for a person."""
    return f"{count / 2**20:,.1f} MiB" if count < 2**33 else f"{count / 2**30:,.1f} GiB"
