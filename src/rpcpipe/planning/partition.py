"""The optimal contiguous partition of layers into stages."""

from __future__ import annotations

import bisect
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from math import frexp, fsum, ldexp
from numbers import Integral
from typing import NamedTuple

from rpcpipe.errors import PartitionError

# fits(stage, start, stop): whether the layers start … stop - 1 fit the stage. Must be monotone: every
# sub-range of a fitting range fits.
Fits = Callable[[int, int, int], bool]

_PRECISION = 52  # bits of the costs' total


def balance(
    costs: Sequence[float], stages: int, communication: Sequence[float] | None = None, fits: Fits | None = None
) -> list[int]:
    """Return the layers per stage, none empty, for which the costliest stage is as cheap as possible.

    Exact: bisection over the sums that can occur as a stage's cost. Of several such cuts, returns the one with the
    least ``communication`` over its borders, where ``communication[layer]`` is what goes from a layer to the next; of
    these the most even one, which has the least sum of the stages' squared costs; of these the one with the shortest
    last stages. Every stage must satisfy ``fits``. Raises PartitionError if there are fewer layers than stages, or no
    cut whose stages all fit.
    """
    if not 1 <= stages <= len(costs):
        raise PartitionError(
            f"cannot cut {len(costs)} layers into {stages} stages: every stage needs a layer;"
            " use fewer workers or split the layers"
        )
    sums = _prefix_sums(costs)
    limit = _least_limit(sums, stages)
    if fits is not None:
        limit = _least_fitting_limit(sums, stages, fits, limit)
    sizes = _best(sums, limit, stages, communication or [0.0] * len(costs), fits)
    assert sizes is not None, "limit is the largest cost of such a cut"
    return sizes


def _prefix_sums(costs: Sequence[float]) -> list[int]:
    """Return prefix sums of the costs as integers, in which equal layers cost the same wherever they are.

    Floats are rounded to multiples of the total's last bit. Where no layer costs anything, all count the same.
    """
    if not any(costs):
        costs = [1] * len(costs)
    if all(isinstance(cost, int) for cost in costs):
        return [0, *accumulate(costs)]  # type: ignore[list-item]
    exponent = _PRECISION - frexp(fsum(costs))[1]
    return [0, *accumulate(round(ldexp(cost, exponent)) for cost in costs)]


def _largest(sums: Sequence[int], sizes: Sequence[int]) -> int:
    """Return the cost of the costliest stage."""
    return max(sums[b] - sums[a] for a, b in pairwise([0, *accumulate(sizes)]))


def _least_limit(sums: Sequence[int], stages: int) -> int:
    """Return the cost of the costliest stage in a min-max cut."""
    low, high = max(-(-sums[-1] // stages), *(b - a for a, b in pairwise(sums))), sums[-1]
    while low < high:
        middle = (low + high) // 2
        if (largest := _fill(sums, middle, stages)) is None:
            low = middle + 1
        else:
            high = largest
    return high


def _fill(sums: Sequence[int], limit: int, stages: int) -> int | None:
    """Return the largest cost of stages filled greedily up to ``limit`` each, or None if they do not suffice."""
    start, largest = 0, 0
    for _ in range(stages):
        end = bisect.bisect_right(sums, sums[start] + limit) - 1
        largest = max(largest, sums[end] - sums[start])
        if (start := end) == len(sums) - 1:
            return largest
    return None


def _least_fitting_limit(sums: Sequence[int], stages: int, fits: Fits, low: int) -> int:
    """Return the cost of the costliest stage in the min-max cut among those that fit; none is below ``low``."""
    free = [0.0] * len(sums)

    def within(limit: int) -> list[int] | None:
        return _reach(sums, limit, stages, fits) or _best(sums, limit, stages, free, fits)

    if within(low) is not None:
        return low
    trial = within(sums[-1])
    if trial is None:
        raise PartitionError(f"no cut of {len(sums) - 1} layers into {stages} stages fits")
    high = _largest(sums, trial)
    while low + 1 < high:  # invariant: no cut fits within low, one does within high
        middle = (low + high) // 2
        trial = within(middle)
        if trial is None:
            low = middle
        else:
            high = _largest(sums, trial)
    return high


def _reach(sums: Sequence[int], limit: int, stages: int, fits: Fits) -> list[int] | None:
    """Fill every stage as far as ``limit`` and ``fits`` allow while each later stage keeps a layer.

    Greedy and fast. Returns None also in the rare case that a cut exists, but needs a shorter stage
    because the layers left do not fit a later one.
    """
    ends = [0]
    layers = len(sums) - 1
    for stage in range(stages):
        end = min(_expiry(sums, limit, stage, ends[-1], fits) - 1, layers - (stages - 1 - stage))
        if end <= ends[-1]:
            return None
        ends.append(end)
    return [b - a for a, b in pairwise(ends)] if ends[-1] == layers else None


def _expiry(sums: Sequence[int], limit: int, stage: int, start: int, fits: Fits | None) -> int:
    """Return the first end to which ``stage`` cannot reach from ``start``."""
    end = bisect.bisect_right(sums, sums[start] + limit, start)
    if fits is None:
        return end
    return start + 1 + bisect.bisect_left(range(start + 1, end), True, key=lambda stop: not fits(stage, start, stop))


def _nearest(sums: Sequence[int], limit: int, stage: int, end: int, fits: Fits | None) -> int:
    """Return the first start from which ``stage`` can reach to ``end``."""
    start = bisect.bisect_left(sums, sums[end] - limit, 0, end)
    return (
        start
        if fits is None
        else start + bisect.bisect_left(range(start, end), True, key=lambda at: fits(stage, at, end))
    )


class _Cut(NamedTuple):
    """The best cut of the layers before ``end`` into the stages so far, the last of which begins at ``start``."""

    communication: float
    squares: int
    end: int
    start: int


class _Candidates:
    """Cuts behind which a stage may begin, of equal communication: gives the most even one for ends that ascend.

    The squares make a later start better from some end on, for good: the queue holds, in order, each start that is the
    best for some ends, with the first of these.
    """

    def __init__(self, sums: Sequence[int]) -> None:
        self._sums = sums
        # cut, first end for which it is the best, first end out of its reach
        self._queue: deque[tuple[_Cut, int, int]] = deque()

    def add(self, cut: _Cut, expiry: int) -> None:
        """Add a cut that ends behind all others; a stage behind it reaches to any end before ``expiry``."""
        queue, best_from = self._queue, 0
        while queue:
            best_from = min(_overtaken(self._sums, queue[-1][0], cut), queue[-1][2])
            if best_from > queue[-1][1]:
                break
            queue.pop()
        queue.append((cut, best_from if queue else 0, expiry))

    def best(self, end: int) -> _Cut:
        """Return the best cut for a stage that ends at ``end``; one reaches so far."""
        while len(self._queue) > 1 and self._queue[1][1] <= end:
            self._queue.popleft()
        return self._queue[0][0]


def _best(
    sums: Sequence[int], limit: int, stages: int, communication: Sequence[float], fits: Fits | None
) -> list[int] | None:
    """Return the cut within ``limit`` that is best by communication, evenness and length of the last stages.

    Returns None if there is no cut. Dynamic programming over (stage, end).
    """
    layers = len(sums) - 1
    cuts = {0: _Cut(0.0, 0, 0, 0)}
    found = []
    for stage, (first, last) in enumerate(_ends(sums, limit, stages, fits)):
        chosen = _starts(sums, limit, stage, list(cuts.values()), range(first, last + 1), fits)
        cuts = {
            end: _Cut(
                before.communication + (communication[end - 1] if end < layers else 0.0),
                before.squares + (sums[end] - sums[before.end]) ** 2,
                end,
                before.end,
            )
            for end, before in chosen
        }
        found.append(cuts)
    if layers not in cuts:
        return None
    ends = [layers]
    for cuts in reversed(found):
        ends.append(cuts[ends[-1]].start)
    return [b - a for a, b in pairwise(reversed(ends))]


def _ends(sums: Sequence[int], limit: int, stages: int, fits: Fits | None) -> list[tuple[int, int]]:
    """Return for each stage the first and the last end that it can have in any cut within ``limit``.

    Where the costliest stage is hardly costlier than the others, these are few.
    """
    layers = len(sums) - 1
    last, first = [0], [layers]
    for stage in range(stages):
        last.append(max(last[-1], _expiry(sums, limit, stage, last[-1], fits) - 1))
    for stage in range(stages - 1, 0, -1):
        first.append(_nearest(sums, limit, stage, first[-1], fits))
    return [
        (max(early, stage), min(late, layers - (stages - stage)))
        for stage, (early, late) in enumerate(zip(reversed(first), last[1:], strict=True), 1)
    ]


def _starts(
    sums: Sequence[int], limit: int, stage: int, before: Sequence[_Cut], ends: range, fits: Fits | None
) -> Iterator[tuple[int, _Cut]]:
    """Yield (end, the cut of ``before`` behind which ``stage`` best begins) for every end that can be reached."""
    alike: defaultdict[float, _Candidates] = defaultdict(lambda: _Candidates(sums))
    # The least communication in reach, and what becomes the least when it is out of reach.
    least: deque[tuple[float, int]] = deque()
    following = 0
    for end in ends:
        while following < len(before) and before[following].end < end:
            cut = before[following]
            following += 1
            expiry = _expiry(sums, limit, stage, cut.end, fits)
            alike[cut.communication].add(cut, expiry)
            while least and least[-1][0] >= cut.communication:
                least.pop()
            least.append((cut.communication, expiry))
        while least and least[0][1] <= end:
            least.popleft()
        if least:
            yield end, alike[least[0][0]].best(end)


def _overtaken(sums: Sequence[int], early: _Cut, late: _Cut) -> int:
    """Return the first end from which a stage behind ``late`` is no worse than one behind ``early``."""
    a, b = sums[early.end], sums[late.end]
    # late is no worse where 2 · (b - a) · sums[end] >= lead.
    lead = late.squares + b * b - early.squares - a * a
    if a == b:
        return 0 if lead <= 0 else len(sums)
    return bisect.bisect_left(sums, -(-lead // (2 * (b - a))))


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
