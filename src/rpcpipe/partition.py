"""Costs of layers → an optimal contiguous cut."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from itertools import accumulate

from rpcpipe.errors import PartitionError


def balance(costs: Sequence[float], stages: int) -> list[int]:
    """Layers per stage, none empty, such that the costliest stage is as cheap as possible.

    Exact: bisection over the sums that can occur as a stage's cost. Raises PartitionError if
    there are fewer layers than stages.
    """
    if not 1 <= stages <= len(costs):
        raise PartitionError(
            f"cannot cut {len(costs)} layers into {stages} stages: every stage needs a layer;"
            " use fewer workers or split the layers"
        )
    sums = [0.0, *accumulate(costs)]
    low, high = max(costs), sums[-1]
    # Invariant: `high` is feasible. The loop ends once no float lies between the bounds, or the
    # greedy fill at the midpoint reaches a sum that was already the best.
    best = _fill(sums, high, stages)
    if (trial := _fill(sums, low, stages)) is not None:
        return _spread(trial, stages)
    while (middle := (low + high) / 2) not in (low, high):
        trial = _fill(sums, middle, stages)
        if trial is None:
            low = middle
        else:
            best, high = trial, max(sums[b] - sums[a] for a, b in zip([0, *trial], trial, strict=False))
    assert best is not None
    return _spread(best, stages)


def _fill(sums: Sequence[float], limit: float, stages: int) -> list[int] | None:
    """Ends of stages filled greedily up to ``limit`` each, or None if they do not suffice."""
    ends: list[int] = []
    start = 0
    while start < len(sums) - 1:
        end = bisect.bisect_right(sums, sums[start] + limit) - 1
        while end > start and sums[end] - sums[start] > limit:
            end -= 1
        if end == start or len(ends) == stages:
            return None
        ends.append(end)
        start = end
    return ends


def _spread(ends: list[int], stages: int) -> list[int]:
    """Layers per stage; where the greedy fill used fewer stages, its largest ones are split."""
    sizes = [b - a for a, b in zip([0, *ends], ends, strict=False)]
    while len(sizes) < stages:
        widest = max(range(len(sizes)), key=sizes.__getitem__)
        half = sizes[widest] // 2
        sizes[widest : widest + 1] = [sizes[widest] - half, half]
    return sizes


def check_balance(given: Sequence[int], layers: int, stages: int) -> list[int]:
    """``given`` if it is a cut of ``layers`` layers into ``stages`` stages, else PartitionError."""
    if len(given) != stages or any(size < 1 for size in given) or sum(given) != layers:
        raise PartitionError(
            f"balance={list(given)} must have {stages} entries of at least 1 that sum to the model's {layers} layers"
            f" (it has {len(given)} entries that sum to {sum(given)})"
        )
    return list(given)
