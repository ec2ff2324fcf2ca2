"""What a worker's memory is made of at its peak, as it is predicted: in figures, as a table and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import groupby

from rpcpipe import _tables

# By part: what a table calls it, and its colour in a picture.
PARTS = {
    "weights": ("weights", "#4c78a8"),
    "gradients": ("gradients", "#72b7b2"),
    "optimizer": ("optimizer state", "#54a24b"),
    "copy": ("copy", "#eeca3b"),
    "versions": ("versions", "#9d755d"),
    "snapshots": ("snapshots", "#ff9da6"),
    "activations": ("activations", "#f58518"),
    "working": ("working", "#e45756"),
    "messages": ("messages", "#b279a2"),
}
_COPIES = 2  # of a stream's state, to go back to
_ROW, _WIDTH, _LEFT, _TOP = 22, 640, 150, 56


@dataclass(frozen=True, kw_only=True)
class WorkerMemory:
    """Bytes of one worker at its peak.

    ``copy``: of weights and optimizer state, from which a failed update is taken back; under an asynchronous schedule
    two copies to go back to, one of which is older. ``versions``: older versions of the weights, which only such a
    schedule has, of micro-batches under way and in these copies. ``snapshots``: for the day when a host is lost, of
    this worker and of those whose keeper it is. ``activations``: what autograd saves, and inputs kept for
    recomputation. ``working``: what the backward of one micro-batch has beside that. ``messages``: values on their way
    from and to other workers.
    """

    weights: float
    gradients: float
    optimizer: float
    copy: float
    versions: float = 0.0
    snapshots: float = 0.0
    activations: float = 0.0
    working: float = 0.0
    messages: float = 0.0

    def plus(self, other: WorkerMemory) -> WorkerMemory:
        """Return the sum, part by part."""
        return WorkerMemory(**{name: own + vars(other)[name] for name, own in vars(self).items()})

    @property
    def total(self) -> float:
        """All parts together."""
        return math.fsum(vars(self).values())  # not astuple, which copies: a search asks 70,000 times


def in_stream(own: WorkerMemory, behind: int, stashes: bool, heals: bool) -> WorkerMemory:
    """Return what a stage holds in a stream that would hold ``own`` in a step.

    There are two copies of its state to go back to, as one is made before the other is dropped. Micro-batches under way
    use weights up to ``behind`` updates old, which are there if the policy ``stashes`` them, and in the copies if the
    stream goes on from these when a worker has died (``heals``). Where weights move from version to version, the place
    that they have in the memory that outlives the worker is empty until the stream ends.
    """
    versions = behind * stashes + (_COPIES * behind + (behind > 0) * stashes) * heals
    return replace(own, copy=_COPIES * own.copy, versions=versions * own.weights)


def used_parts(workers: Sequence[WorkerMemory]) -> list[str]:
    """Return the names of the parts that some worker has."""
    return [name for name in PARTS if any(getattr(worker, name) > 0 for worker in workers)]


def table(workers: Sequence[WorkerMemory]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows, in one unit; neighbours with the same figures share a row."""
    names = used_parts(workers)
    unit, size = ("GiB", 2**30) if max(worker.total for worker in workers) >= 2**33 else ("MiB", 2**20)
    figures = [
        [f"{part / size:,.1f} {unit}" for part in (*(getattr(worker, name) for name in names), worker.total)]
        for worker in workers
    ]
    rows, first = list[list[str]](), 0
    for row, alike in groupby(figures):
        last = first + len(list(alike)) - 1
        rows.append([str(first) if first == last else f"{first}–{last}", *row])
        first = last + 1
    return ["worker", *(PARTS[name][0] for name in names), "at most"], rows


def picture(workers: Sequence[WorkerMemory], limit: float, title: str) -> str:
    """Return an SVG with a bar for every worker, and a line at the ``limit``, if that is finite."""
    longest = max(worker.total for worker in workers)
    scale = _WIDTH / max(longest, limit if limit < math.inf else longest)
    height = _TOP + _ROW * len(workers) + 30
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 110}" height="{height}"'
        ' font-family="sans-serif" font-size="11">',
        f'<text x="8" y="18" font-size="13">{escape(title)}</text>',
        *_legend(used_parts(workers)),
    ]
    for index, worker in enumerate(workers):
        lines += _bar(index, worker, scale)
    if limit < math.inf:
        x = _LEFT + limit * scale
        lines += [
            f'<line x1="{x:.1f}" y1="{_TOP - 6}" x2="{x:.1f}" y2="{height - 24}" stroke="black"'
            ' stroke-dasharray="4 3"/>',
            f'<text x="{x:.1f}" y="{height - 8}" text-anchor="end">limit {_tables.mebibytes(limit)}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


def _legend(names: Sequence[str]) -> list[str]:
    lines, step = list[str](), (_LEFT + _WIDTH) / len(PARTS)
    for index, name in enumerate(names):
        label, colour = PARTS[name]
        x = 8 + step * index
        lines += [
            f'<rect x="{x:.1f}" y="28" width="10" height="10" fill="{colour}"/>',
            f'<text x="{x + 14:.1f}" y="37">{label}</text>',
        ]
    return lines


def _bar(index: int, worker: WorkerMemory, scale: float) -> list[str]:
    y, x = _TOP + _ROW * index, float(_LEFT)
    lines = [f'<text x="{_LEFT - 8}" y="{y + 14}" text-anchor="end">worker {index}</text>']
    for name in used_parts([worker]):
        label, colour = PARTS[name]
        size = getattr(worker, name)
        lines.append(
            f'<rect x="{x:.1f}" y="{y}" width="{size * scale:.1f}" height="{_ROW - 4}" fill="{colour}">'
            f"<title>worker {index}: {label} {_tables.mebibytes(size)}</title></rect>"
        )
        x += size * scale
    return [*lines, f'<text x="{x + 4:.1f}" y="{y + 14}">{_tables.mebibytes(worker.total)}</text>']
