"""Schedules by name. A new schedule is one generator and one entry of ``_REGISTRY``."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

from rpcpipe.errors import ArgumentError, ScheduleError, shown
from rpcpipe.schedules import asynchronous, linear, looped, vshaped
from rpcpipe.schedules.action import Action
from rpcpipe.schedules.schedule import Schedule
from rpcpipe.schedules.weight_versions import POLICIES, choose

_LARGEST = 1 << 20  # workers × micro-batches × virtual stages of a schedule, which takes seconds to make
_LARGEST_CACHED = 1 << 10  # workers × micro-batches × virtual stages of a schedule that is cached

_Rows = Callable[[int, int, int], Sequence[Iterable[Action]]]  # (workers, chunks, virtual stages)


@dataclass(frozen=True)
class Traits:
    """Says what a search for plans has to know of a schedule.

    ``simplicity``: its rank among those that are equally fast and large, the simplest one's is 0; None: it is in no
    plan. ``splits``: some backwards are split. ``serial``: one worker computes at a time. ``keeps_all``: a worker has
    all micro-batches' activations at once. ``lengthens_rounds``: micro-batches left over by whole rounds
    (as many as workers) make as many rounds longer by one. ``deepest``: the most workers in a row whose rows are made
    quickly enough for a search.
    """

    simplicity: int | None = None
    splits: bool = False
    serial: bool = False
    keeps_all: bool = False
    lengthens_rounds: bool = False
    deepest: float = math.inf


class _Entry(NamedTuple):
    """How to make a schedule, its line in a table, and what a search knows of it."""

    rows: _Rows
    shape: str  # "line": one stage per worker, "loop": v ≥ 2, "v": two in a V
    note: str
    traits: Traits = Traits()
    fewest_chunks: Callable[[int], int] = lambda workers: 1


def _line(generator: Callable[[int, int, int], Iterable[Action]]) -> _Rows:
    return lambda workers, chunks, _: [generator(rank, workers, chunks) for rank in range(workers)]


def _loop(generator: Callable[[int, int, int, int], Iterable[Action]]) -> _Rows:
    return lambda workers, chunks, virtual: [generator(rank, workers, chunks, virtual) for rank in range(workers)]


_REGISTRY: dict[str, _Entry] = {
    "naive": _Entry(_line(linear.naive), "line", "one micro-batch at a time", Traits(8, serial=True)),
    "gpipe": _Entry(_line(linear.gpipe), "line", "all forwards, then all backwards", Traits(1, keeps_all=True)),
    "1f1b": _Entry(
        _line(linear.one_f_one_b), "line", "gpipe's bubble, K micro-batches in memory; the default", Traits(0)
    ),
    "eager-1f1b": _Entry(
        _line(linear.eager_one_f_one_b), "line", "1f1b with transfers hidden, more memory", Traits(2)
    ),
    "interleaved": _Entry(
        _loop(looped.interleaved), "loop", "1f1b's bubble divided by v, more transfers",
        Traits(3, lengthens_rounds=True),
    ),
    "looped-bfs": _Entry(
        _loop(looped.looped_bfs), "loop", "breadth first; fewest switches between stages", Traits(4, keeps_all=True)
    ),
    "zb-h1": _Entry(
        _line(linear.zb_h1), "line", "weight gradients fill the drain; K in memory everywhere", Traits(5, splits=True)
    ),
    "zb-v": _Entry(
        lambda workers, chunks, _: vshaped.zb_v(workers, chunks), "v", "split backward in a V; half of zb-h1's bubble",
        Traits(6, splits=True, deepest=16),
    ),
    "dualpipe-v": _Entry(
        _line(vshaped.dualpipe_v), "v", "forwards paired with backwards; M ≥ 2K", Traits(7, splits=True),
        lambda workers: 2 * workers,
    ),
    "pipedream": _Entry(
        lambda workers, chunks, _: asynchronous.rows(workers, [chunks], every=True),
        "line", "an update after every micro-batch, weights in versions; never flushes",
    ),
    "pipedream-2bw": _Entry(
        lambda workers, chunks, _: asynchronous.rows(workers, [chunks], every=False),
        "line", "an update after every M ≥ K micro-batches, two versions; never flushes",
        fewest_chunks=lambda workers: workers,
    ),
}  # fmt: skip


def names() -> list[str]:
    """Return the names that ``get`` and ``Pipeline(schedule=…)`` accept."""
    return list(_REGISTRY)


def traits(name: str) -> Traits:
    """Return what a search for plans has to know of the schedule ``name``."""
    return _entry(name).traits


def planned() -> tuple[str, ...]:
    """Return the names of the schedules that plans may have, the simplest first."""
    ranks = {name: rank for name, entry in _REGISTRY.items() if (rank := entry.traits.simplicity) is not None}
    return tuple(sorted(ranks, key=lambda name: ranks[name]))


def describe(name: str) -> str:
    """Return one line on the schedule ``name``."""
    return _entry(name).note


def virtual_stages_of(name: str, virtual_stages: int) -> int:
    """Return the stages per worker (V-shaped schedules always have two); raises ScheduleError where undefined."""
    shape = _entry(name).shape
    if shape == "v" and virtual_stages in (1, 2):
        return 2
    if (shape == "line" and virtual_stages == 1) or (shape == "loop" and virtual_stages >= 2):
        return virtual_stages
    wanted = {"line": "has 1 stage", "loop": "needs 2 or more stages", "v": "has 2 stages"}[shape]
    raise ScheduleError(f"{name!r} {wanted} per worker; virtual_stages={virtual_stages} does not fit")


def fewest_virtual_stages(name: str) -> int:
    """Return the fewest stages per worker for which ``name`` is defined."""
    return {"line": 1, "loop": 2, "v": 2}[_entry(name).shape]


def fewest_chunks(name: str, workers: int) -> int:
    """Return the fewest micro-batches for which ``name`` is defined."""
    return _entry(name).fewest_chunks(workers)


def suited_virtual_stages(name: str, wanted: int) -> int:
    """Return ``wanted`` stages per worker where ``name`` leaves the choice, else the number that it needs."""
    fewest = fewest_virtual_stages(name)
    return max(wanted, fewest) if _entry(name).shape == "loop" else fewest


def get(name: str, workers: int, chunks: int, virtual_stages: int = 1) -> Schedule:
    """Return the schedule ``name`` for these sizes; raises ScheduleError where it is not defined."""
    entry = _entry(name)
    sizes = workers, chunks, virtual_stages
    # A cache takes 4.0 for 4.
    if not all(isinstance(size, Integral) and not isinstance(size, bool) and size >= 1 for size in sizes):
        raise ArgumentError(
            "workers, chunks and virtual_stages must be whole numbers and at least 1, not"
            f" {workers!r}, {chunks!r}, {virtual_stages!r}"
        )
    if (pairs := workers * chunks * virtual_stages) > _LARGEST:
        raise ScheduleError(
            f"{workers} workers, chunks={chunks} and virtual_stages={virtual_stages} make {pairs:,} pairs of a stage"
            f" and a micro-batch, and a schedule has at most {_LARGEST:,}: use fewer micro-batches; a batch never makes"
            " more of them than it has samples"
        )
    virtual = virtual_stages_of(name, virtual_stages)
    if chunks < entry.fewest_chunks(workers):
        raise ScheduleError(
            f"{name!r} needs at least {entry.fewest_chunks(workers)} micro-batches on {workers} workers, not {chunks}"
        )
    make = _make if workers * chunks * virtual <= _LARGEST_CACHED else _make.__wrapped__
    return make(name, workers, chunks, virtual)


@functools.lru_cache(maxsize=256)  # a search asks for the same ones again and again
def _make(name: str, workers: int, chunks: int, virtual: int) -> Schedule:
    rows = tuple(tuple(row) for row in _entry(name).rows(workers, chunks, virtual))
    return Schedule(name, chunks, placement(name, workers, virtual), rows)


def placement(name: str, workers: int, virtual_stages: int) -> tuple[int, ...]:
    """Return the worker of every stage under the schedule ``name``."""
    if _entry(name).shape == "v":
        return vshaped.v_placement(workers)
    return looped.loop_placement(workers, virtual_stages)


def streamed(name: str, workers: int, chunks: int, batches: int) -> Schedule:
    """Return an asynchronous schedule over ``batches`` batches of ``chunks`` micro-batches, without a flush between.

    Raises ScheduleError for a schedule that flushes after every batch.
    """
    policy = choose(name, None)
    if policy is None:
        raise ScheduleError(f"{name!r} flushes after every batch; {' and '.join(POLICIES)} do not")
    known = get(name, workers, chunks)
    rows = asynchronous.rows(workers, [chunks] * batches, every=not policy.by_batch)
    return Schedule(name, chunks * batches, known.placement, tuple(tuple(row) for row in rows))


def forward_only(schedule: Schedule, chunks: int) -> Schedule:
    """Return inference on ``schedule``'s placement: every worker forwards stage by stage, chunk by chunk."""
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


def _entry(name: str) -> _Entry:
    if not isinstance(name, str) or name not in _REGISTRY:
        raise ArgumentError(f"unknown schedule {shown(name)}; known are {', '.join(names())}")
    return _REGISTRY[name]
