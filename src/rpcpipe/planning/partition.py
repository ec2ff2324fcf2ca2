"""The optimal contiguous partition of layers into stages."""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from math import inf
from numbers import Integral

from rpcpipe.errors import PartitionError

# fits(stage, start, stop): whether the layers start … stop - 1 fit the stage. Must be monotone: every
# sub-range of a fitting range fits.
Fits = Callable[[int, int, int], bool]


def balance(
    costs: Sequence[float], stages: int, communication: Sequence[float] | None = None, fits: Fits | None = None
) -> list[int]:
    """Return the layers per stage, none empty, for which the costliest stage is as cheap as possible.

    Exact: bisection over the sums that can occur as a stage's cost. Of several such cuts, returns the one
    with the least ``communication`` over its borders, where ``communication[layer]`` is what goes from
    a layer to the next. Every stage must satisfy ``fits``. Raises PartitionError if there are fewer
    layers than stages, or no cut whose stages all fit.
    """
    sums = [0.0, *accumulate(costs)]
    sizes = _min_max(costs, stages)
    if fits is not None:
        sizes = _fitting(sums, stages, fits, _largest(sums, sizes))
    if communication is None:
        return sizes
    cheapest = _least_communication(sums, _largest(sums, sizes), stages, communication, fits)
    assert cheapest is not None, "sizes is such a cut"
    return cheapest


def _largest(sums: Sequence[float], sizes: Sequence[int]) -> float:
    """Return the cost of the costliest stage; ``sums`` are prefix sums of the layers' costs."""
    return max(sums[b] - sums[a] for a, b in pairwise([0, *accumulate(sizes)]))


def _fitting(sums: Sequence[float], stages: int, fits: Fits, low: float) -> list[int]:
    """Return the min-max cut among those that fit, by bisection; no cut is below ``low``."""
    free = [0.0] * len(sums)

    def within(limit: float) -> list[int] | None:
        return _reach(sums, limit, stages, fits) or _least_communication(sums, limit, stages, free, fits)

    if (trial := within(low)) is not None:
        return trial
    best = within(sums[-1])
    if best is None:
        raise PartitionError(f"no cut of {len(sums) - 1} layers into {stages} stages fits")
    high = _largest(sums, best)
    while (middle := (low + high) / 2) not in (low, high):
        trial = within(middle)
        if trial is None:
            low = middle
        else:
            best, high = trial, _largest(sums, trial)
    return best


def _reach(sums: Sequence[float], limit: float, stages: int, fits: Fits) -> list[int] | None:
    """Fill every stage as far as ``limit`` and ``fits`` allow while each later stage keeps a layer.

    Greedy and fast. Returns None also in the rare case that a cut exists, but needs a shorter stage
    because the layers left do not fit a later one.
    """
    ends = [0]
    start, layers = 0, len(sums) - 1
    for stage in range(stages):
        first = start

        def too_long(end: int, stage: int = stage, first: int = first) -> bool:
            return sums[end] - sums[first] > limit or not fits(stage, first, end)

        last = layers - (stages - 1 - stage)
        start = first + bisect.bisect_left(range(first + 1, last + 1), True, key=too_long)
        if start == first:
            return None
        ends.append(start)
    return [b - a for a, b in pairwise(ends)] if start == layers else None


def _least_communication(
    sums: Sequence[float], limit: float, stages: int, communication: Sequence[float], fits: Fits | None
) -> list[int] | None:
    """Return the cut within ``limit`` with the least communication, or None if there is no cut.

    Dynamic programming over (stage, end); the last stage's start is the minimum of a sliding window.
    """
    layers = len(sums) - 1
    best: list[float] = [0.0] + [inf] * layers  # least communication of the stages so far, ending before each layer
    starts: list[list[int]] = []
    for stage in range(1, stages + 1):
        here, start = [inf] * (layers + 1), [0] * (layers + 1)
        window: deque[int] = deque()  # candidates for the start, cheapest first
        for end in range(stage, layers - (stages - stage) + 1):
            cost = best[end - 1]
            while window and best[window[-1]] >= cost:
                window.pop()
            window.append(end - 1)
            while sums[end] - sums[window[0]] > limit or (fits and not fits(stage - 1, window[0], end)):
                window.popleft()
                if not window:
                    break
            if window and best[window[0]] < inf:
                start[end] = window[0]
                here[end] = best[window[0]] + (communication[end - 1] if end < layers else 0.0)
        best = here
        starts.append(start)
    if best[layers] == inf:
        return None
    ends = [layers]
    for start in reversed(starts):
        ends.append(start[ends[-1]])
    return [b - a for a, b in pairwise(reversed(ends))]


def _min_max(costs: Sequence[float], stages: int) -> list[int]:
    """Return the layers per stage of the min-max cut; raises PartitionError for fewer layers than stages."""
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
    """Return the ends of stages filled greedily up to ``limit`` each, or None if they do not suffice."""
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
    """Return the layers per stage; where the greedy fill used fewer stages, the longest ones are halved."""
    sizes = [b - a for a, b in zip([0, *ends], ends, strict=False)]
    while len(sizes) < stages:
        widest = max(range(len(sizes)), key=sizes.__getitem__)
        half = sizes[widest] // 2
        sizes[widest : widest + 1] = [sizes[widest] - half, half]
    return sizes


def check_balance(sizes: Sequence[int], layers: int, stages: int) -> list[int]:
    """Return ``sizes`` as a list; raises PartitionError unless they cut ``layers`` layers into ``stages`` stages."""
    whole = all(isinstance(size, Integral) and not isinstance(size, bool) and size >= 1 for size in sizes)
    if len(sizes) != stages or not whole or sum(sizes) != layers:
        total = f" that sum to {sum(sizes)}" if whole else ""
        raise PartitionError(
            f"balance={list(sizes)} must have {stages} entries, whole numbers of at least 1, that sum to the model's"
            f" {layers} layers (it has {len(sizes)} entries{total})"
        )
    return [int(size) for size in sizes]
