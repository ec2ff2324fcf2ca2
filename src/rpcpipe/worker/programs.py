"""Programs that workers keep: in a message, what stands for tasks that have travelled before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rpcpipe.worker.operations import Task

# A worker keeps the tasks of so many programs, those with the greatest numbers.
KEPT_PROGRAMS = 32


class Keep(NamedTuple):
    """Tasks in a message, to be kept as those of ``program`` on this worker from ``start`` on."""

    program: int
    start: int
    tasks: tuple[Task, ...]


class Kept(NamedTuple):
    """Stands in a message for the kept tasks of ``program`` from ``start`` up to ``stop``."""

    program: int
    start: int
    stop: int


Sent = Task | Keep | Kept


def places(sent: Sequence[Sent]) -> int:
    """Return the number of tasks that ``sent`` stands for."""
    count = 0
    for item in sent:
        match item:
            case Keep():
                count += len(item.tasks)
            case Kept():
                count += item.stop - item.start
            case Task():
                count += 1
    return count
