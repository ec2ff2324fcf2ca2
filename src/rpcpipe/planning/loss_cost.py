"""What the loss of a worker, or of its host, costs."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import groupby

# Of the time, at most, snapshots are under way.
SNAPSHOT_SHARE = 0.02
# From a worker's death to its successor's first action, whatever the model: the median of 199 kills
# (``benchmarks/kills``), on a host with two cores.
REPLACEMENT_SECONDS = 0.11
# Snapshots that are whole or on their way at once: the one before counts until all workers have the next.
_IN_TURN = 2
# Of every worker's state, with its keeper's.
SNAPSHOTS = 2 * _IN_TURN


@dataclass(frozen=True)
class Healing:
    """Which deaths are healed: those of ``workers``, and those of ``hosts`` where snapshots are taken for that.

    ``hosts``: by worker, its host; () where none is healed.
    """

    workers: bool = True
    hosts: tuple[str, ...] = ()


def host_names(workers: int, hosts: int) -> tuple[str, ...]:
    """Return by worker the host of so many ``workers`` on ``hosts``, each of which has its share; () for one host."""
    return tuple(f"host{worker * hosts // workers}" for worker in range(workers)) if hosts > 1 else ()


def keepers(hosts: Sequence[Hashable]) -> list[int]:
    """Return by worker the index of the other one that has its snapshot: on another host, each as few as can be.

    ``hosts``: of every worker, two at least that differ.
    """
    numbers = {host: number for number, host in enumerate(dict.fromkeys(hosts))}
    order = sorted(range(len(hosts)), key=lambda worker: numbers[hosts[worker]])  # one host after the other
    groups = [list(same) for _, same in groupby(order, key=lambda worker: numbers[hosts[worker]])]
    largest = max(groups, key=len)
    others = [worker for worker in order if hosts[worker] != hosts[largest[0]]]
    assert others
    found = [0] * len(hosts)
    if len(largest) > len(others):
        for one, two in ((largest, others), (others, largest)):
            for index, worker in enumerate(one):
                found[worker] = two[index % len(two)]
        return found
    # No group is longer than the largest, and none shorter than the way round it.
    for index, worker in enumerate(order):
        found[worker] = order[(index + len(largest)) % len(order)]
    return found


_keepers = functools.lru_cache(maxsize=64)(keepers)


def snapshot_bytes(state: Sequence[float], hosts: Sequence[Hashable]) -> list[float]:
    """Return by worker the most bytes of snapshots: its own ``state`` and those that it keeps for others.

    Each is there twice while the next is on its way. 0 where all ``hosts`` are one.
    """
    if len(set(hosts)) < 2:
        return [0.0] * len(state)
    taken = list(state)
    for worker, keeper in enumerate(_keepers(tuple(hosts))):
        taken[keeper] += state[worker]
    return [_IN_TURN * size for size in taken]


@dataclass(frozen=True)
class LossCost:
    """What a worker's loss costs; ``worker_seconds`` and ``host_seconds`` are the longest that training is set back.

    ``worker_seconds``: its process dies; another takes its memory over, and the step is made again. ``host_seconds``:
    its host dies; all steps since the newest snapshot are made again, inf where the bandwidth is not known.
    ``snapshot_bytes``: by worker of one replica, what snapshots take at most where there are several hosts, as
    ``snapshot_bytes`` counts them.
    """

    worker_seconds: float
    host_seconds: float
    snapshot_bytes: tuple[float, ...]

    @classmethod
    def of(
        cls, step: float, state: Sequence[float], snapshots: Sequence[float], latency: float, bandwidth: float
    ) -> LossCost:
        """Return the cost where a step takes ``step`` seconds.

        By worker: ``state``, bytes of weights and moments, and ``snapshots``, as ``snapshot_bytes`` counts them.
        """
        transfer = math.inf if bandwidth == math.inf else latency + max(state) / bandwidth
        # A snapshot is due once the one before has paid for itself, and until it is there the one before counts.
        since = transfer / SNAPSHOT_SHARE + transfer + step
        return cls(REPLACEMENT_SECONDS + step, REPLACEMENT_SECONDS + transfer + since, tuple(snapshots))
