"""The figures of the steps so far, as many as a chart can show."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from rpcpipe.errors import ArgumentError, shown

_MOST = 4000


class Point(NamedTuple):
    """The figures of one step that are drawn over time; None for what is not known or not finite.

    ``seconds``: the step's wall time. ``rate``: ``StepResult.throughput``. ``time``: when it was done, in seconds since
    1970.
    """

    step: int
    loss: float | None
    grad_norm: float | None
    seconds: float | None
    bubble: float | None
    rate: float | None
    time: float | None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Point:
        """Return the point of a record of ``rp.callbacks``; raises KeyError, TypeError or ArgumentError for others."""
        figures = [record[name] for name in ("loss", "grad_norm", "seconds")]
        figures += [record.get(name) for name in ("bubble", "throughput", "time")]
        if not isinstance(record["step"], int) or not all(map(_is_figure, figures)):
            raise ArgumentError(f"a figure of step {shown(record['step'])} is no number")
        return cls(record["step"], *figures)


def _is_figure(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value is None or (number and math.isfinite(value))


class History:
    """Points by step. One thread adds, any thread reads.

    From some 4000 points on every second one is dropped. A step that is done again, after a checkpoint was loaded,
    takes the place of the old one and of all after it.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[int, Point]] = []
        self._count = 0

    def add(self, point: Point) -> None:
        """Add the point of a step that is done."""
        while self._entries and self._entries[-1][1].step >= point.step:
            self._entries.pop()
        if len(self._entries) >= _MOST:
            self._entries = self._entries[::2]  # a new list: a reader may be copying the old one
        self._entries.append((self._count, point))
        self._count += 1

    def clear(self) -> None:
        """Forget all points."""
        self._entries = []

    def since(self, cursor: int) -> tuple[list[Point], int]:
        """Return the points added after those before ``cursor`` (0: all), and the cursor for the next call."""
        entries = self._entries[:]
        found = [point for number, point in entries if number >= cursor]
        return found, max(cursor, entries[-1][0] + 1 if entries else 0)
