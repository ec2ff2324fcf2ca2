"""Format small tables for a terminal or a notebook, and numbers of bytes; read numbers of bytes."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from rpcpipe.errors import ArgumentError


def text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the table as text, with columns as wide as their widest cell and no trailing blanks."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    return "\n".join("  " + line.rstrip() for line in lines)


def markup(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the table as HTML under ``title``, with every cell escaped."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<b>{html.escape(title)}</b><table>{line(header, 'th')}{body}</table>"


def mebibytes(count: float) -> str:
    """Return ``count`` bytes as text in MiB, or in GiB from 8 GiB on."""
    return f"{count / 2**20:,.1f} MiB" if count < 2**33 else f"{count / 2**30:,.1f} GiB"


_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def parse_bytes(text: str) -> float:
    """Return the bytes that ``text`` says, such as 80GiB, 1.5 TB or 4096; raises ArgumentError for other text."""
    match = re.fullmatch(r"([0-9]+[.]?[0-9]*|[.][0-9]+) *([kMGT]?i?)B?", text.strip(), re.ASCII)
    if match is None or match[2] not in _UNITS:
        raise ArgumentError(f"{text!r} is no number of bytes: write such as 80GiB, 80GB or 85899345920")
    return float(match[1]) * _UNITS[match[2]]
