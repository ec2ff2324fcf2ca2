"""The search for the fastest way to run a model on some workers, within their memory, by simulation.

Every candidate (schedule, depth, micro-batch, recomputation) has a lower bound of its step time; those
that cannot beat the best so far are skipped. Where the partitions of a candidate are few, all are tried;
else the min-max partition is, and the borders of the best candidate are moved one by one. Where the
candidates are too many to simulate, those that are best by a formula are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, combinations, pairwise, product

from rpcpipe import schedules
from rpcpipe.errors import PartitionError
from rpcpipe.planning import partition
from rpcpipe.planning.cost_model import EQUAL, SIMPLEST, Candidate, CostModel, Estimate

CHECKPOINTS = ("never", "except_last", "always")
VIRTUAL = (2, 3, 4)

_ALL_PARTITIONS = 2_000  # Up to this many partitions of one candidate, all are tried.
# Work is counted in actions examined; 100,000 take about half a second.
_SEARCH_BUDGET = 100_000
_COMPARISON_BUDGET = 150_000  # including the search
_REFINEMENT_BUDGET = 200_000  # including search and comparison
_PARTITION_WORK = 15  # actions per layer that take as long as a partition


@dataclass
class Search:
    """The search for the fastest way to train ``batch`` samples a step, with the predictions of ``cost_model``.

    ``layouts``: (workers in a row, replicas) to try, by default all workers in one row. ``undo``: of all candidates.
    ``exact``: whether everything has been tried. ``best_by_schedule``: the best simulated, by schedule and workers in a
    row.
    """

    cost_model: CostModel
    batch: int
    names: Sequence[str] = SIMPLEST
    layouts: Sequence[tuple[int, int]] = ()
    checkpoints: Sequence[str] = CHECKPOINTS
    undo: str = "copy"
    exact: bool = True
    best_by_schedule: dict[tuple[str, int], Estimate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.machine = self.cost_model.machine
        self.layers = self.cost_model.layers
        self._slowest_seconds: dict[tuple[int, int, tuple[int, ...]], float] = {}
        self._partition_work = -self.cost_model.work_done  # of a search before

    def anew(self, undo: str) -> Search:
        """Return the same search, of candidates with ``undo``, of which nothing has been tried."""
        return replace(self, undo=undo, exact=True, best_by_schedule={})

    # --- candidates ---

    def candidates(self) -> Iterator[Candidate]:
        """Yield all candidates that are defined for these sizes."""
        for depth, replicas in self.layouts or [(self.machine.workers, 1)]:
            samples = -(-self.batch // replicas)
            for size in self.cost_model.sums:
                for name in self.names if size <= samples else ():
                    if depth > schedules.traits(name).deepest:
                        self.exact = False
                        continue
                    yield from self._candidates_of(name, depth, replicas, size, -(-samples // size))

    def _candidates_of(self, name: str, depth: int, replicas: int, size: int, chunks: int) -> Iterator[Candidate]:
        fewest = schedules.fewest_virtual_stages(name)
        shardings = (False, True) if replicas > 1 and self.machine.memory < math.inf else (False,)
        for virtual in VIRTUAL if schedules.suited_virtual_stages(name, 4) == 4 else (fewest,):
            if depth * virtual <= self.layers and chunks >= schedules.fewest_chunks(name, depth):
                for checkpoint, sharded in product(self.checkpoints, shardings):
                    yield Candidate(
                        schedule=name, depth=depth, replicas=replicas, virtual_stages=virtual, micro_batch=size,
                        chunks=chunks, checkpoint=checkpoint, sharded=sharded, undo=self.undo,
                    )  # fmt: skip

    # --- bounds ---

    def bound(self, candidate: Candidate) -> float:
        """Return seconds that ``candidate`` takes at least, with any partition.

        Worker w cannot begin before the forwards of those ahead, nor end before their backwards unless
        these are split; the least of the largest such sum is a geometric series. Recomputation occupies
        its worker, but may overlap with others' waits, as weight gradients may.
        """
        sums, cores = self.cost_model.sums[candidate.micro_batch], self.machine.cores or math.inf
        work, forward = sums.least_work(candidate)[-1], sums.times["forward"][-1]
        if candidate.splits:
            chain = forward + sums.times["any_gradient"][-1]
        elif candidate.virtual_stages > 1:
            chain = work
        else:
            chain = work / (1 - (1 - 1 / candidate.chunks) ** candidate.depth)
        total = candidate.chunks * (work + (forward if candidate.checkpoint == "always" else 0.0))
        reduced = self.cost_model.all_reduce(candidate.replicas, sums.parameters[-1] / candidate.depth)
        # The worker with most to compute and the one with most to reduce may differ, so the two do not add up.
        least = max(chain, total / candidate.depth, total * candidate.replicas / cores, reduced)
        return least + self.cost_model.least_around(candidate)

    def _bound_of_cut(self, candidate: Candidate, ends: Sequence[int]) -> float:
        """Return seconds that ``candidate`` takes at least with the partition that ends stages at ``ends``."""
        sums = self.cost_model.sums[candidate.micro_batch]
        work, forward = sums.least_work(candidate), sums.times["forward"]
        load, first = [0.0] * candidate.depth, [math.inf] * candidate.depth
        for stage, (worker, (start, stop)) in enumerate(zip(candidate.placement, pairwise(ends), strict=True)):
            again = forward[stop] - forward[start] if candidate.drops(stage) else 0.0
            load[worker] += work[stop] - work[start] + again
            first[worker] = min(first[worker], forward[start] if candidate.splits else work[start])
        least = max(ahead + candidate.chunks * share for ahead, share in zip(first, load, strict=True))
        return least + self.cost_model.least_around(candidate)

    def heuristic(self, candidate: Candidate) -> float:
        """Return about how many seconds ``candidate`` takes if memory is no limit.

        That is the slowest worker's time, bubble, all-reduce, and what the driver takes before the first action.
        """
        sums = self.cost_model.sums[candidate.micro_batch]
        seconds = self._slowest(candidate)
        if candidate.checkpoint != "never":
            work = sums.times["forward"][-1] + sums.times["backward"][-1]
            seconds *= 1 + sums.times["forward"][-1] / work
        idle = (candidate.depth - 1) * _idle(candidate.schedule, candidate.virtual_stages)
        reduced = self.cost_model.all_reduce(candidate.replicas, sums.parameters[-1] / candidate.depth)
        serial = candidate.depth if schedules.traits(candidate.schedule).serial else 1
        return seconds * (candidate.chunks + idle) * serial + reduced + self.cost_model.least_around(candidate)

    def _slowest(self, candidate: Candidate) -> float:
        """Return the seconds of the slowest worker's micro-batch, under the min-max partition."""
        size, stages, placement = candidate.micro_batch, candidate.stages, candidate.placement
        if (size, stages, placement) not in self._slowest_seconds:
            times, loads = self.cost_model.sums[size].times, [0.0] * candidate.depth
            work = [f + b for f, b in zip(times["forward"], times["backward"], strict=True)]
            ends = [0, *accumulate(partition.balance([b - a for a, b in pairwise(work)], stages))]
            for worker, (a, b) in zip(placement, pairwise(ends), strict=True):
                loads[worker] += work[b] - work[a]
            self._slowest_seconds[size, stages, placement] = max(loads)
        return self._slowest_seconds[size, stages, placement]

    def fits(self, memory: Sequence[float]) -> bool:
        """Return whether every worker's bytes are within the machine's memory."""
        return max(memory) <= self.machine.memory

    def may_fit(self, candidate: Candidate) -> bool:
        """Return whether weights and activations would fit if each were spread over the workers as well as possible."""
        sums, limit = self.cost_model.sums[candidate.micro_batch], self.machine.memory
        if self.cost_model.least_bytes(candidate, 0, sums.layers) / candidate.depth > limit:
            return False
        if candidate.checkpoint != "never" or limit == math.inf:
            return True
        # The least of the largest alive[k] × share[k] where the shares add up to all. Fewer micro-batches
        # never have more alive, so the shorter step gives a bound.
        first, _ = candidate.shorter() or (candidate, candidate)
        return sums.activations[-1] / sum(1 / alive for alive in self.cost_model.in_flight(first)) <= limit

    # --- the search ---

    def best(self) -> Estimate | None:
        """Return the fastest estimate that fits, or None. ``exact`` is False afterwards if not all could be tried."""
        best = self._best_candidate(math.inf)
        if best is None:
            return None
        self._complete_comparison(best.candidate)
        return best if self.exact else self._with_moved_borders(best)

    def best_below(self, seconds: float) -> Estimate | None:
        """Return the fastest estimate that fits if it is faster than ``seconds``, else None; others are not tried."""
        best = self._best_candidate(seconds)
        if best is None or best.seconds >= seconds:
            return None
        return best if self.exact else self._with_moved_borders(best)

    def _best_candidate(self, seconds: float) -> Estimate | None:
        """Return the best estimate of the candidates that may take less than ``seconds``."""
        best: Estimate | None = None
        for candidate in sorted(self.candidates(), key=self._rank):
            if best is not None and self._work_done() > _SEARCH_BUDGET:
                self.exact = False
                break
            slowest = seconds if best is None else min(seconds, best.seconds)
            if self.bound(candidate) <= slowest * EQUAL and self.may_fit(candidate):
                best = self._best_partition(candidate, best)
        return best

    def _rank(self, candidate: Candidate) -> tuple[float, int, int, Candidate]:
        simplicity = SIMPLEST.index(candidate.schedule), CHECKPOINTS.index(candidate.checkpoint)
        return self.heuristic(candidate), *simplicity, candidate

    def _work_done(self) -> int:
        return self.cost_model.work_done + self._partition_work

    def _complete_comparison(self, best: Candidate) -> None:
        """Simulate the other schedules at ``best``'s depth that a bound or the budget has skipped.

        They appear beside it in the plan.
        """
        for candidate in self.candidates():
            if (candidate.depth, candidate.micro_batch) != (best.depth, best.micro_batch):
                continue
            known = (candidate.schedule, candidate.depth) in self.best_by_schedule
            if known or schedules.traits(candidate.schedule).serial or not self.may_fit(candidate):
                continue
            if self._work_done() < _COMPARISON_BUDGET:
                try:
                    self.try_partition(candidate, self.min_max(candidate))
                except PartitionError:
                    continue  # it does not fit

    def _best_partition(self, candidate: Candidate, best: Estimate | None) -> Estimate | None:
        for balance in self._partitions(candidate):
            ends = [0, *accumulate(balance)]
            if best is not None and self._bound_of_cut(candidate, ends) > best.seconds * EQUAL:
                continue
            estimate = self.try_partition(candidate, balance)
            if estimate is not None and estimate.beats(best):
                best = estimate
        return best

    def try_partition(self, candidate: Candidate, balance: Sequence[int]) -> Estimate | None:
        """Estimate ``candidate`` with this partition and record it in ``best_by_schedule``; None if it does not fit."""
        model, ends = self.cost_model, [0, *accumulate(balance)]
        if not self.fits([worker.total for worker in model.parameter_memory(candidate, ends)]):
            return None
        if not self.fits(memory := model.memory(candidate, ends)):
            return None
        estimate = model.estimate(candidate, balance, memory)
        if estimate.beats(self.best_by_schedule.get((candidate.schedule, candidate.depth))):
            self.best_by_schedule[candidate.schedule, candidate.depth] = estimate
        return estimate

    def _partitions(self, candidate: Candidate) -> Iterator[Sequence[int]]:
        """Yield all partitions where they are few, else the min-max one if any fits."""
        if math.comb(self.layers - 1, candidate.stages - 1) <= _ALL_PARTITIONS:
            for ends in combinations(range(1, self.layers), candidate.stages - 1):
                yield [b - a for a, b in pairwise((0, *ends, self.layers))]
            return
        self.exact = False
        try:
            yield self.min_max(candidate)
        except PartitionError:
            return

    def min_max(self, candidate: Candidate) -> list[int]:
        """Return the partition with the fastest slowest stage, every stage within its share of the memory.

        Raises PartitionError where no partition fits.
        """
        self._partition_work += _PARTITION_WORK * self.layers
        work = [b - a for a, b in pairwise(self.cost_model.sums[candidate.micro_batch].least_work(candidate))]
        fits = None if self.machine.memory == math.inf else self._stage_fits(candidate)
        return partition.balance(work, candidate.stages, fits=fits)

    def _stage_fits(self, candidate: Candidate) -> Callable[[int, int, int], bool]:
        sums, limit = self.cost_model.sums[candidate.micro_batch], self.machine.memory / candidate.virtual_stages
        alive = self.cost_model.in_flight(candidate)

        def fits(stage: int, start: int, stop: int) -> bool:
            kept, once = sums.activations[stop] - sums.activations[start], sums.single_peak(start, stop)
            activations = alive[stage] * sums.inputs[start] + once
            if not candidate.drops(stage):
                activations = alive[stage] * kept + once - kept
            return self.cost_model.least_bytes(candidate, start, stop) + activations <= limit

        return fits

    def _with_moved_borders(self, best: Estimate) -> Estimate:
        """Move a border of the slowest stage inwards by a layer, as long as that is faster."""
        while self._work_done() < _REFINEMENT_BUDGET:
            improved = self._improved(best)
            if improved is None:
                break
            best = improved
        return best

    def _improved(self, best: Estimate) -> Estimate | None:
        """Return the first estimate that beats ``best`` with a layer of its slowest stage in a neighbouring one."""
        work = self.cost_model.sums[best.candidate.micro_batch].least_work(best.candidate)
        ends = [0, *accumulate(best.balance)]
        slowest = max(range(len(best.balance)), key=lambda stage: work[ends[stage + 1]] - work[ends[stage]])
        for neighbour in (slowest - 1, slowest + 1):
            sizes = list(best.balance)
            if 0 <= neighbour < len(sizes) and sizes[slowest] > 1:
                sizes[slowest] -= 1
                sizes[neighbour] += 1
                estimate = self.try_partition(best.candidate, sizes)
                if estimate is not None and estimate.beats(best):
                    return estimate
        return None


def layouts(workers: int, layers: int, replicas: int | None) -> list[tuple[int, int]]:
    """Return the (workers in a row, replicas) that use all ``workers``, or as many as ``layers`` allow.

    ``replicas``: how many, or None for any number.
    """
    if replicas is not None and replicas > workers:
        raise PartitionError(f"replicas={replicas} need as many workers, and there are {workers}: use fewer replicas")
    counts = range(1, workers + 1) if replicas is None else [replicas]
    rows = [(workers // count, count) for count in counts if workers % count == 0 and workers // count <= layers]
    fewest = -(-workers // layers)  # replicas that are needed where rows are as long as possible
    if fewest in counts and workers // fewest * fewest != workers:
        rows.append((workers // fewest, fewest))
    return rows or [(min(workers // counts[0], layers), counts[0])]


@functools.lru_cache(maxsize=64)
def _idle(name: str, virtual: int) -> float:
    """Return a worker's idle time, in micro-batches per worker ahead of it, in a small pipeline with equal stages."""
    if schedules.traits(name).serial:
        return 0.0
    workers, chunks = 4, 16
    timeline = schedules.get(name, workers, chunks, virtual).simulate()
    return timeline.bubble / (1 - timeline.bubble) * chunks / (workers - 1)
