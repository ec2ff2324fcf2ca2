"""Schedules with several stages per worker, laid out in a loop: worker k holds stages k, k + K, …"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from rpcpipe.schedules.action import Action


def loop_placement(workers: int, virtual_stages: int) -> tuple[int, ...]:
    """Return the worker of every stage: stage s is on worker s mod K."""
    return tuple(range(workers)) * virtual_stages


def interleaved(rank: int, workers: int, chunks: int, virtual_stages: int) -> Iterator[Action]:
    """Yield interleaved 1F1B (Narayanan et al., "Efficient Large-Scale LM Training", section 2.2).

    A worker's row consists of units, each a micro-batch through one of its stages, taken a round of
    micro-batches at a time through stage after stage; warm-up 2(K - 1 - k) + (v - 1)n units, n the longest
    round, then one forward and one backward unit in turn. At M ≥ K the makespan is (vM + K - 1)(F + B).
    """
    rounds = _rounds(workers, chunks)
    own = [rank + workers * turn for turn in range(virtual_stages)]
    forwards = [Action("F", stage, chunk) for chosen in rounds for stage in own for chunk in chosen]
    backwards = [Action("B", stage, chunk) for chosen in rounds for stage in reversed(own) for chunk in chosen]
    warmup = min(len(forwards), 2 * (workers - 1 - rank) + (virtual_stages - 1) * len(rounds[0]))
    yield from forwards[:warmup]
    for unit, backward in enumerate(backwards):
        yield from forwards[warmup + unit : warmup + unit + 1]
        yield backward


def _rounds(workers: int, chunks: int) -> list[range]:
    """Return the micro-batches in as many rounds as can have K or more each, of even lengths, longer ones first.

    K of them keep every worker busy until the first returns for the next stage; the longest is kept short,
    as all of it is alive (Llama 3, section 3.3.2, has any such number a round; the paper above only K).
    """
    count = max(1, chunks // workers)
    length, longer = divmod(chunks, count)
    starts = [turn * length + min(turn, longer) for turn in range(count + 1)]
    return [range(first, end) for first, end in pairwise(starts)]


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
