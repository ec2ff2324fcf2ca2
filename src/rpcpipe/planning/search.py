"""The fastest way to run a model on some workers that fits their memory; the simulator is the judge.

Every choice of schedule, depth, micro-batch and recomputation has a lower bound of its step time; those
that cannot beat what was found are left out. Where the cuts of a choice can be counted, all are tried;
else the min-max cut, and the best choice's borders are moved one by one. Where the choices are too many
to simulate, those that look best by a formula are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, combinations, pairwise, product

from rpcpipe import schedules
from rpcpipe.errors import PartitionError
from rpcpipe.planning.cost_model import EQUAL, SIMPLEST, Choice, Estimate, Estimator
from rpcpipe.planning.partition import balance as cut

CHECKPOINTS = ("never", "except_last", "always")
VIRTUAL = (2, 3, 4)

_ALL_CUTS = 2_000  # up to so many cuts of one choice are all tried
_BUDGET = 100_000  # actions looked at, about half a second; then the best so far is it
_CUT = 15  # actions are looked at in the time that a cut takes per layer
_SEARCHED = 16  # workers in a row up to which zb-v, which is itself found by a search, is made


@dataclass
class Search:
    """One question: how to train ``batch`` samples a step with what ``costs`` knows."""

    costs: Estimator
    batch: int
    names: Sequence[str] = SIMPLEST
    layouts: Sequence[tuple[int, int]] = ()  # (workers in a row, replicas); by default all in one row
    checkpoints: Sequence[str] = CHECKPOINTS
    exact: bool = True  # has everything been tried?
    # The best that was simulated, by schedule and workers in a row.
    found: dict[tuple[str, int], Estimate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.machine = self.costs.machine
        self.layers = self.costs.layers
        self._shares: dict[tuple[int, int, tuple[int, ...]], float] = {}

    # --- what there is to choose from ---

    def choices(self) -> Iterator[Choice]:
        """All that are defined for these sizes."""
        for depth, replicas in self.layouts or [(self.machine.workers, 1)]:
            share = -(-self.batch // replicas)
            for size in self.costs.models:
                for name in self.names if size <= share else ():
                    if name == "zb-v" and depth > _SEARCHED:
                        self.exact = False
                        continue
                    yield from self._of(name, depth, replicas, size, -(-share // size))

    def _of(self, name: str, depth: int, replicas: int, size: int, chunks: int) -> Iterator[Choice]:
        fewest = schedules.fewest_virtual_stages(name)
        shardings = (False, True) if replicas > 1 and self.machine.memory < math.inf else (False,)
        for virtual in VIRTUAL if schedules.suited_virtual_stages(name, 4) == 4 else (fewest,):
            if depth * virtual <= self.layers and chunks >= schedules.fewest_chunks(name, depth):
                for checkpoint, sharded in product(self.checkpoints, shardings):
                    yield Choice(name, depth, replicas, virtual, size, chunks, checkpoint, sharded)

    def bound(self, choice: Choice) -> float:
        """No cut of ``choice`` takes less.

        Worker w cannot begin before the forwards of those ahead, nor end before their backwards unless
        these are split; the least of the largest such sum is a geometric series. Recomputation keeps
        every worker busy, but can be hidden from the others, as weight gradients can.
        """
        model, cores = self.costs.models[choice.micro_batch], self.machine.cores or math.inf
        work, forward = model.least_work(choice)[-1], model.times["forward"][-1]
        if choice.splits:
            chain = forward + model.times["any_gradient"][-1]
        elif choice.virtual_stages > 1:
            chain = work
        else:
            chain = work / (1 - (1 - 1 / choice.chunks) ** choice.depth)
        total = choice.chunks * (work + (forward if choice.checkpoint == "always" else 0.0))
        reduced = self.costs.all_reduce(choice.replicas, model.parameters[-1] / choice.depth)
        # Who has most to compute and who has most to reduce need not be the same worker.
        return max(chain, total / choice.depth, total * choice.replicas / cores, reduced)

    def _bound_of_cut(self, choice: Choice, ends: Sequence[int]) -> float:
        """The same for one cut."""
        model = self.costs.models[choice.micro_batch]
        work, forward = model.least_work(choice), model.times["forward"]
        load, first = [0.0] * choice.depth, [math.inf] * choice.depth
        for stage, (worker, (start, stop)) in enumerate(zip(choice.placement, pairwise(ends), strict=True)):
            again = forward[stop] - forward[start] if choice.drops(stage) else 0.0
            load[worker] += work[stop] - work[start] + again
            first[worker] = min(first[worker], forward[start] if choice.splits else work[start])
        return max(ahead + choice.chunks * share for ahead, share in zip(first, load, strict=True))

    def guess(self, choice: Choice) -> float:
        """About what ``choice`` takes if memory does not matter: its slowest worker's time, bubble, all-reduce."""
        model = self.costs.models[choice.micro_batch]
        share = self._slowest(choice)
        if choice.checkpoint != "never":
            work = model.times["forward"][-1] + model.times["backward"][-1]
            share *= 1 + model.times["forward"][-1] / work
        idle = (choice.depth - 1) * _idle(choice.schedule, choice.virtual_stages)
        reduced = self.costs.all_reduce(choice.replicas, model.parameters[-1] / choice.depth)
        return share * (choice.chunks + idle) * (choice.depth if choice.schedule == "naive" else 1) + reduced

    def _slowest(self, choice: Choice) -> float:
        """Seconds of the slowest worker's micro-batch, under the cut that makes its slowest stage fastest."""
        size, stages, placed = choice.micro_batch, choice.stages, choice.placement
        if (size, stages, placed) not in self._shares:
            times, loads = self.costs.models[size].times, [0.0] * choice.depth
            work = [f + b for f, b in zip(times["forward"], times["backward"], strict=True)]
            ends = [0, *accumulate(cut([b - a for a, b in pairwise(work)], stages))]
            for worker, (a, b) in zip(placed, pairwise(ends), strict=True):
                loads[worker] += work[b] - work[a]
            self._shares[size, stages, placed] = max(loads)
        return self._shares[size, stages, placed]

    # --- the search ---

    def fits(self, memory: Sequence[float]) -> bool:
        return max(memory) <= self.machine.memory

    def possible(self, choice: Choice) -> bool:
        """Would the weights fit, and the activations, if each were spread as well as can be?"""
        model, limit = self.costs.models[choice.micro_batch], self.machine.memory
        if choice.copies(self.machine.moments) * model.parameters[-1] / choice.depth > limit:
            return False
        if choice.checkpoint != "never" or limit == math.inf:
            return True
        # The least of the largest alive[k] × share[k] where the shares add up to all; in fewer
        # micro-batches not more are alive.
        first, _ = choice.shorter() or (choice, choice)
        return model.activations[-1] / sum(1 / alive for alive in self.costs.in_flight(first)) <= limit

    def best(self) -> Estimate | None:
        """The fastest that fits, or None. ``exact`` is False if not all could be tried."""
        found: Estimate | None = None
        ranked = sorted(self.choices(), key=self._order)
        for choice in ranked:
            if found is not None and self.costs.looked_at > _BUDGET:
                self.exact = False
                break
            if (found is None or self.bound(choice) <= found.seconds * EQUAL) and self.possible(choice):
                found = self._best_cut(choice, found)
        if found is None:
            return None
        self._complete(found.choice)
        return found if self.exact else self._moved(found)

    def _order(self, choice: Choice) -> tuple[float, int, int, Choice]:
        return self.guess(choice), SIMPLEST.index(choice.schedule), CHECKPOINTS.index(choice.checkpoint), choice

    def _complete(self, best: Choice) -> None:
        """Simulate the schedules that a bound or the budget has left out, for as many workers in a row: to compare."""
        for choice in (c for c in self.choices() if (c.depth, c.micro_batch) == (best.depth, best.micro_batch)):
            if choice.schedule == "naive" or (choice.schedule, choice.depth) in self.found or not self.possible(choice):
                continue
            if self.costs.looked_at < 1.5 * _BUDGET:
                try:
                    self.tried(choice, self.min_max(choice))
                except PartitionError:
                    continue  # it does not fit

    def _best_cut(self, choice: Choice, found: Estimate | None) -> Estimate | None:
        for balance in self._cuts(choice):
            ends = [0, *accumulate(balance)]
            if found is not None and self._bound_of_cut(choice, ends) > found.seconds * EQUAL:
                continue
            estimate = self.tried(choice, balance)
            if estimate is not None and estimate.beats(found):
                found = estimate
        return found

    def tried(self, choice: Choice, balance: Sequence[int]) -> Estimate | None:
        """The estimate, noted; None where it does not fit."""
        ends = [0, *accumulate(balance)]
        if not self.fits(self.costs.fixed(choice, ends)) or not self.fits(memory := self.costs.memory(choice, ends)):
            return None
        estimate = self.costs.estimate(choice, balance, memory)
        if estimate.beats(self.found.get((choice.schedule, choice.depth))):
            self.found[choice.schedule, choice.depth] = estimate
        return estimate

    def _cuts(self, choice: Choice) -> Iterator[Sequence[int]]:
        if math.comb(self.layers - 1, choice.stages - 1) <= _ALL_CUTS:
            for ends in combinations(range(1, self.layers), choice.stages - 1):
                yield [b - a for a, b in pairwise((0, *ends, self.layers))]
            return
        self.exact = False
        try:
            yield self.min_max(choice)
        except PartitionError:
            return

    def min_max(self, choice: Choice) -> list[int]:
        """The cut that makes the slowest stage fastest, every stage within its share of the memory."""
        model = self.costs.models[choice.micro_batch]
        self.costs.looked_at += _CUT * self.layers
        work = [b - a for a, b in pairwise(model.least_work(choice))]
        return cut(work, choice.stages, fits=None if self.machine.memory == math.inf else self._fitting(choice))

    def _fitting(self, choice: Choice) -> Callable[[int, int, int], bool]:
        model, limit = self.costs.models[choice.micro_batch], self.machine.memory / choice.virtual_stages
        alive, held = self.costs.in_flight(choice), choice.copies(self.machine.moments)

        def fits(stage: int, a: int, b: int) -> bool:
            activations: float = model.activations[b] - model.activations[a]
            if choice.drops(stage):
                activations += alive[stage] * model.inputs[a]
            else:
                activations *= alive[stage]
            return held * (model.parameters[b] - model.parameters[a]) + activations <= limit

        return fits

    def _moved(self, found: Estimate) -> Estimate:
        """Move a border of the slowest stage by a layer, inwards, as long as that helps."""
        work = self.costs.models[found.choice.micro_batch].least_work(found.choice)
        better = True
        while better and self.costs.looked_at < 2 * _BUDGET:
            better = False
            ends = [0, *accumulate(found.balance)]
            slowest = max(range(len(found.balance)), key=lambda stage: work[ends[stage + 1]] - work[ends[stage]])
            for neighbour in (slowest - 1, slowest + 1):
                sizes = list(found.balance)
                if 0 <= neighbour < len(sizes) and sizes[slowest] > 1:
                    sizes[slowest] -= 1
                    sizes[neighbour] += 1
                    estimate = self.tried(found.choice, sizes)
                    if estimate is not None and estimate.beats(found):
                        found, better = estimate, True
                        break
        return found


def layouts(workers: int, layers: int, replicas: int | None) -> list[tuple[int, int]]:
    """(workers in a row, replicas) that use all ``workers``, or where layers are few as many as can be.

    ``replicas``: how many, or None for any.
    """
    counts = range(1, workers + 1) if replicas is None else [replicas]
    found = [(workers // count, count) for count in counts if workers % count == 0 and workers // count <= layers]
    fewest = -(-workers // layers)  # of the longest rows
    if fewest in counts and workers // fewest * fewest != workers:
        found.append((workers // fewest, fewest))
    return found or [(min(workers // counts[0], layers), counts[0])]


@functools.lru_cache(maxsize=64)
def _idle(name: str, virtual: int) -> float:
    """A worker's idle time in micro-batches per worker ahead of it, for equal stages: of a small pipeline."""
    workers, chunks = 4, 16
    timeline = schedules.get(name, workers, chunks, virtual).simulate()
    return timeline.bubble / (1 - timeline.bubble) * chunks / (workers - 1) if name != "naive" else 0.0
