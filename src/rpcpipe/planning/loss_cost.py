"""What the loss of a worker, or of its host, costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Of the time, at most, snapshots are under way.
SNAPSHOT_SHARE = 0.02
# From a worker's death to its successor's first action, whatever the model: the median of 199 kills
# (``benchmarks/kills``), on a host with two cores.
REPLACEMENT_SECONDS = 0.11


@dataclass(frozen=True)
class LossCost:
    """What a worker's loss costs; ``worker_seconds`` and ``host_seconds`` are the longest that training is set back.

    ``worker_seconds``: its process dies; another takes its memory over, and the step is made again. ``host_seconds``:
    its host dies; all steps since the newest snapshot are made again, inf where the bandwidth is not known.
    ``snapshot_bytes``: by worker of one replica, what snapshots take while there are several hosts: the worker's own,
    and that of the worker whose keeper it is.
    """

    worker_seconds: float
    host_seconds: float
    snapshot_bytes: tuple[float, ...]

    @classmethod
    def of(cls, step: float, state: Sequence[float], latency: float, bandwidth: float) -> LossCost:
        """Return the cost where a step takes ``step`` seconds; ``state``: by worker, bytes of weights and moments."""
        taken = tuple(own + state[index - 1] for index, own in enumerate(state))
        transfer = math.inf if bandwidth == math.inf else latency + max(state) / bandwidth
        # A snapshot is due once the one before has paid for itself, and until it is there the one before counts.
        since = transfer / SNAPSHOT_SHARE + transfer + step
        return cls(REPLACEMENT_SECONDS + step, REPLACEMENT_SECONDS + transfer + since, taken)
