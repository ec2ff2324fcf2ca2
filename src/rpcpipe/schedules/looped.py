"""Schedules with several stages per worker, laid out in a loop: worker k holds stages k, k + K, …"""

from __future__ import annotations

from collections.abc import Iterator

from rpcpipe.schedules.action import Action


def loop_placement(workers: int, virtual_stages: int) -> tuple[int, ...]:
    """Return the worker of every stage: stage s is on worker s mod K."""
    return tuple(range(workers)) * virtual_stages


def interleaved(rank: int, workers: int, chunks: int, virtual_stages: int) -> Iterator[Action]:
    """Yield interleaved 1F1B (Narayanan et al., "Efficient Large-Scale LM Training", section 2.2).

    A worker's row consists of units, each a micro-batch through one of its stages, taken K
    micro-batches at a time through stage after stage; warm-up 2(K - 1 - k) + (v - 1)K units, then
    one forward and one backward unit in turn. Where K does not divide M, the row is that of the
    next multiple with the micro-batches that do not exist left out: what remains still respects
    every dependency, because those join actions of one micro-batch only.
    """
    full = -(-chunks // workers) * workers
    groups = [range(first, first + workers) for first in range(0, full, workers)]
    own = [rank + workers * turn for turn in range(virtual_stages)]
    forwards = [Action("F", stage, chunk) for group in groups for stage in own for chunk in group]
    backwards = [Action("B", stage, chunk) for group in groups for stage in reversed(own) for chunk in group]
    warmup = min(len(forwards), 2 * (workers - 1 - rank) + (virtual_stages - 1) * workers)
    row = forwards[:warmup]
    for unit, backward in enumerate(backwards):
        row += forwards[warmup + unit : warmup + unit + 1]
        row.append(backward)
    return (action for action in row if action.chunk < chunks)


def looped_bfs(rank: int, workers: int, chunks: int, virtual_stages: int) -> Iterator[Action]:
    """Yield the stages breadth first (Lamy-Poirier, "Breadth-First Pipeline Parallelism", section 4).

    All micro-batches through one stage, then all through the worker's next; backwards in reverse
    order of stages with the micro-batches ascending, as everywhere in rpcpipe.
    """
    own = [rank + workers * turn for turn in range(virtual_stages)]
    for stage in own:
        for chunk in range(chunks):
            yield Action("F", stage, chunk)
    for stage in reversed(own):
        for chunk in range(chunks):
            yield Action("B", stage, chunk)
