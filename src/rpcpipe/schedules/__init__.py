"""Schedules by name. A new one is one generator and one entry of ``_FAMILY``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from rpcpipe.errors import ScheduleError
from rpcpipe.schedules import asynchronous, linear, looped, vshaped
from rpcpipe.schedules.action import Action
from rpcpipe.schedules.formulas import bubble_fraction, optimal_microbatches
from rpcpipe.schedules.schedule import Schedule
from rpcpipe.schedules.weight_versions import POLICIES

__all__ = [
    "Action",
    "Schedule",
    "bubble_fraction",
    "describe",
    "fewest_chunks",
    "fewest_virtual_stages",
    "forward_only",
    "get",
    "names",
    "optimal_microbatches",
    "placement",
    "streamed",
    "suited_virtual_stages",
    "virtual_stages_of",
]

_LARGEST_KEPT = 1 << 10  # workers × micro-batches × virtual stages of a schedule that is kept

_Rows = Callable[[int, int, int], Sequence[Iterable[Action]]]  # (workers, chunks, virtual stages)


class _Known(NamedTuple):
    """How a schedule is made, and what is said of it in a table."""

    rows: _Rows
    shape: str  # "line": one stage per worker, "loop": v ≥ 2, "v": two in a V
    note: str
    fewest_chunks: Callable[[int], int] = lambda workers: 1


def _line(generator: Callable[[int, int, int], Iterable[Action]]) -> _Rows:
    return lambda workers, chunks, _: [generator(rank, workers, chunks) for rank in range(workers)]


def _loop(generator: Callable[[int, int, int, int], Iterable[Action]]) -> _Rows:
    return lambda workers, chunks, virtual: [generator(rank, workers, chunks, virtual) for rank in range(workers)]


_FAMILY: dict[str, _Known] = {
    "naive": _Known(_line(linear.naive), "line", "one micro-batch at a time"),
    "gpipe": _Known(_line(linear.gpipe), "line", "all forwards, then all backwards"),
    "1f1b": _Known(_line(linear.one_f_one_b), "line", "gpipe's bubble, K micro-batches in memory; the default"),
    "eager-1f1b": _Known(_line(linear.eager_one_f_one_b), "line", "1f1b with transfers hidden, more memory"),
    "interleaved": _Known(_loop(looped.interleaved), "loop", "1f1b's bubble divided by v, more transfers"),
    "looped-bfs": _Known(_loop(looped.looped_bfs), "loop", "breadth first; fewest switches between stages"),
    "zb-h1": _Known(_line(linear.zb_h1), "line", "weight gradients fill the drain; K in memory everywhere"),
    "zb-v": _Known(
        lambda workers, chunks, _: vshaped.zb_v(workers, chunks), "v", "split backward in a V; half of zb-h1's bubble"
    ),
    "dualpipe-v": _Known(
        _line(vshaped.dualpipe_v), "v", "forwards paired with backwards; M ≥ 2K", lambda workers: 2 * workers
    ),
    "pipedream": _Known(
        lambda workers, chunks, _: asynchronous.rows(workers, [chunks], every=True),
        "line", "an update after every micro-batch, weights in versions; never flushes",
    ),
    "pipedream-2bw": _Known(
        lambda workers, chunks, _: asynchronous.rows(workers, [chunks], every=False),
        "line", "an update after every M ≥ K micro-batches, two versions; never flushes", lambda workers: workers,
    ),
}  # fmt: skip


def names() -> list[str]:
    """The names ``get`` and ``Pipeline(schedule=…)`` accept."""
    return list(_FAMILY)


def describe(name: str) -> str:
    """One line on the schedule ``name``."""
    return _known(name).note


def virtual_stages_of(name: str, virtual_stages: int) -> int:
    """Stages per worker: V-shaped schedules always have two; raises ScheduleError where undefined."""
    shape = _known(name).shape
    if shape == "v" and virtual_stages in (1, 2):
        return 2
    if (shape == "line" and virtual_stages == 1) or (shape == "loop" and virtual_stages >= 2):
        return virtual_stages
    wanted = {"line": "has 1 stage", "loop": "needs 2 or more stages", "v": "has 2 stages"}[shape]
    raise ScheduleError(f"{name!r} {wanted} per worker; virtual_stages={virtual_stages} does not fit")


def fewest_virtual_stages(name: str) -> int:
    """The fewest stages per worker for which ``name`` is defined."""
    return {"line": 1, "loop": 2, "v": 2}[_known(name).shape]


def fewest_chunks(name: str, workers: int) -> int:
    """The fewest micro-batches for which ``name`` is defined."""
    return _known(name).fewest_chunks(workers)


def suited_virtual_stages(name: str, wanted: int) -> int:
    """``wanted`` stages per worker where ``name`` leaves the choice, else what it needs."""
    fewest = fewest_virtual_stages(name)
    return max(wanted, fewest) if _known(name).shape == "loop" else fewest


def get(name: str, workers: int, chunks: int, virtual_stages: int = 1) -> Schedule:
    """The schedule ``name`` for these sizes; raises ScheduleError where it is not defined."""
    known = _known(name)
    if workers < 1 or chunks < 1 or virtual_stages < 1:
        raise ScheduleError(
            f"workers, chunks and virtual_stages must be at least 1, not {workers}, {chunks}, {virtual_stages}"
        )
    virtual = virtual_stages_of(name, virtual_stages)
    if chunks < known.fewest_chunks(workers):
        raise ScheduleError(
            f"{name!r} needs at least {known.fewest_chunks(workers)} micro-batches on {workers} workers, not {chunks}"
        )
    make = _made if workers * chunks * virtual <= _LARGEST_KEPT else _made.__wrapped__
    return make(name, workers, chunks, virtual)


@functools.lru_cache(maxsize=256)  # a search asks for the same ones again and again
def _made(name: str, workers: int, chunks: int, virtual: int) -> Schedule:
    rows = tuple(tuple(row) for row in _known(name).rows(workers, chunks, virtual))
    return Schedule(name, chunks, placement(name, workers, virtual), rows)


def placement(name: str, workers: int, virtual_stages: int) -> tuple[int, ...]:
    """The worker of every stage under the schedule ``name``."""
    if _known(name).shape == "v":
        return vshaped.v_placement(workers)
    return looped.loop_placement(workers, virtual_stages)


def streamed(name: str, workers: int, chunks: int, batches: int) -> Schedule:
    """An asynchronous schedule over ``batches`` batches of ``chunks`` micro-batches, without a flush between them."""
    if name not in POLICIES:
        raise ScheduleError(f"{name!r} flushes after every batch; {' and '.join(POLICIES)} do not")
    known = get(name, workers, chunks)
    rows = asynchronous.rows(workers, [chunks] * batches, every=name == "pipedream")
    return Schedule(name, chunks * batches, known.placement, tuple(tuple(row) for row in rows))


def forward_only(schedule: Schedule, chunks: int) -> Schedule:
    """Inference on ``schedule``'s placement: every worker forwards stage by stage, chunk by chunk."""
    rows = [
        tuple(
            Action("F", stage, chunk)
            for stage, holder in enumerate(schedule.placement)
            if holder == worker
            for chunk in range(chunks)
        )
        for worker in range(schedule.workers)
    ]
    return Schedule("forward", chunks, schedule.placement, tuple(rows))


def _known(name: str) -> _Known:
    if name not in _FAMILY:
        raise ScheduleError(f"unknown schedule {name!r}; known are {', '.join(names())}")
    return _FAMILY[name]
