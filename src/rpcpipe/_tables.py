"""Small tables, for a terminal and for a notebook."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from rpcpipe.errors import ArgumentError


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


_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def parse_bytes(text: str) -> float:
    """Bytes from what a person writes: 80GiB, 1.5 TB, 4096. Raises ArgumentError for anything else."""
    found = re.fullmatch(r"([0-9.]+) *([kMGT]?i?)B?", text.strip())
    if found is None or found[2] not in _UNITS:
        raise ArgumentError(f"{text!r} is no number of bytes: write such as 80GiB, 80GB or 85899345920")
    return float(found[1]) * _UNITS[found[2]]
