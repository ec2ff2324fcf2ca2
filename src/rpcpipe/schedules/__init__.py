"""Schedules by name. A new one is one generator and one line in ``_ONE_STAGE_PER_WORKER``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rpcpipe.errors import ScheduleError
from rpcpipe.schedules import synchronous
from rpcpipe.schedules.action import Action
from rpcpipe.schedules.formulas import bubble_fraction, optimal_microbatches
from rpcpipe.schedules.schedule import Schedule

__all__ = ["Action", "Schedule", "bubble_fraction", "forward_only", "get", "names", "optimal_microbatches"]

_Generator = Callable[[int, int, int], Iterator[Action]]

_ONE_STAGE_PER_WORKER: dict[str, _Generator] = {
    "naive": synchronous.naive,
    "gpipe": synchronous.gpipe,
    "1f1b": synchronous.one_f_one_b,
}


def names() -> list[str]:
    """The names ``get`` and ``Pipeline(schedule=…)`` accept."""
    return list(_ONE_STAGE_PER_WORKER)


def get(name: str, workers: int, chunks: int, virtual_stages: int = 1) -> Schedule:
    """The schedule ``name`` for these sizes; raises ScheduleError where it is not defined."""
    if name not in _ONE_STAGE_PER_WORKER:
        raise ScheduleError(f"unknown schedule {name!r}; known are {', '.join(names())}")
    if workers < 1 or chunks < 1 or virtual_stages < 1:
        raise ScheduleError(
            f"workers, chunks and virtual_stages must be at least 1, not {workers}, {chunks}, {virtual_stages}"
        )
    if virtual_stages != 1:
        raise ScheduleError(f"{name!r} holds one stage per worker, not virtual_stages={virtual_stages}")
    return _build(name, _ONE_STAGE_PER_WORKER[name], workers, chunks)


def forward_only(schedule: Schedule, chunks: int) -> Schedule:
    """Inference on ``schedule``'s placement: every worker forwards chunk by chunk, stage by stage."""
    rows = [
        tuple(
            Action("F", stage, chunk)
            for chunk in range(chunks)
            for stage, holder in enumerate(schedule.placement)
            if holder == worker
        )
        for worker in range(schedule.workers)
    ]
    return Schedule("forward", chunks, schedule.placement, tuple(rows))


def _build(name: str, generator: _Generator, workers: int, chunks: int) -> Schedule:
    rows = tuple(tuple(generator(rank, workers, chunks)) for rank in range(workers))
    return Schedule(name, chunks, tuple(range(workers)), rows)
