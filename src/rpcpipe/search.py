"""The fastest way to run a model on some workers that fits their memory; the simulator is the judge.

Every choice of schedule, depth, micro-batch and recomputation has a lower bound of its step time. They are
tried in that order until no bound is below what was found. Where the cuts of a choice can be counted,
all are tried; else the min-max cut, and the best choice's borders are moved one by one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, combinations, pairwise
from typing import NamedTuple

from rpcpipe import schedules
from rpcpipe.errors import PartitionError
from rpcpipe.memory import Drops, peak_activation_bytes, peak_worker_bytes
from rpcpipe.partition import balance as cut
from rpcpipe.profiles import LayerProfile, copies
from rpcpipe.schedules import Schedule
from rpcpipe.simulate import Costs, simulate
from rpcpipe.timeline import Timeline
from rpcpipe.versions import POLICIES

# The simplest first: what to take where two are equally fast and large.
SIMPLEST = ("1f1b", "gpipe", "eager-1f1b", "interleaved", "looped-bfs", "zb-h1", "zb-v", "dualpipe-v", "naive")
CHECKPOINTS = ("never", "except_last", "always")
VIRTUAL = (2, 3, 4)

_ALL_CUTS = 2_000  # up to so many cuts of one choice are all tried
_BUDGET = 200_000  # simulated actions, about a second; then the best so far is it
_EQUAL = 1 + 1e-9
_TIMES = ("forward", "backward", "input_gradient", "weight_gradient", "update")


@dataclass(frozen=True)
class Machine:
    """Workers that are alike: bytes of memory each, seconds and bytes per second from one to another.

    ``cores``: those that all share. ``moments``: the optimizer's state in copies of the parameters.
    """

    workers: int
    memory: float = math.inf
    latency: float = 0.0
    bandwidth: float = math.inf
    cores: int | None = None
    moments: int = 2


class Choice(NamedTuple):
    """All but the cut. ``depth`` workers are one pipeline, of which there are ``replicas``."""

    schedule: str
    depth: int
    replicas: int
    virtual_stages: int
    micro_batch: int
    chunks: int
    checkpoint: str

    @property
    def stages(self) -> int:
        return self.depth * self.virtual_stages

    def made(self) -> Schedule:
        return _schedule(self.schedule, self.depth, self.chunks, self.virtual_stages)

    def drops(self, stage: int) -> bool:
        """Are the stage's activations recomputed?"""
        return self.checkpoint == "always" or (self.checkpoint == "except_last" and stage < self.stages - 1)


@dataclass(frozen=True)
class Estimate:
    """What a choice and a cut come to: seconds a step, bubble, bytes by worker."""

    choice: Choice
    balance: tuple[int, ...]
    seconds: float
    bubble: float
    memory: tuple[int, ...]

    def beats(self, other: Estimate | None) -> bool:
        """Faster; where equally fast, smaller; then simpler."""
        if other is None or self.seconds * _EQUAL < other.seconds:
            return True
        return self.seconds <= other.seconds * _EQUAL and self._tie() < other._tie()

    def _tie(self) -> tuple[int, int]:
        return max(self.memory), SIMPLEST.index(self.choice.schedule)


@functools.lru_cache(maxsize=256)
def _schedule(name: str, workers: int, chunks: int, virtual: int) -> Schedule:
    return schedules.get(name, workers, chunks, virtual)


@functools.lru_cache(maxsize=1024)
def _in_flight(name: str, workers: int, chunks: int, virtual: int) -> tuple[int, ...]:
    """Micro-batches per stage."""
    schedule = _schedule(name, workers, chunks, virtual)
    return peak_activation_bytes(schedule, [1] * schedule.stages, [0] * schedule.stages)


class Model:
    """Sums over the layers' profiles for one size of a micro-batch."""

    def __init__(self, layers: Sequence[LayerProfile], input_bytes: int) -> None:
        self.layers = len(layers)
        self.outputs = [layer.output_bytes for layer in layers]
        self.inputs = [input_bytes, *self.outputs]
        columns = {name: [float(getattr(layer, name)) for layer in layers] for name in _TIMES}
        halves = list(zip(columns["input_gradient"], columns["weight_gradient"], columns["backward"], strict=True))
        # Where a schedule splits some backwards: the least that one takes, and that holds up the stage before.
        columns["any_backward"] = [min(i + w, whole) for i, w, whole in halves]
        columns["any_gradient"] = [min(i, whole) for i, _, whole in halves]
        self.times = {name: [0.0, *accumulate(column)] for name, column in columns.items()}
        self.activations = [0, *accumulate(layer.activation_bytes for layer in layers)]
        self.parameters = [0, *accumulate(layer.parameter_bytes for layer in layers)]

    def least_work(self, choice: Choice) -> list[float]:
        """Prefix sums of the seconds that a micro-batch takes at least, whether its backward is split or not.

        Without recomputation, which may be hidden in a wait.
        """
        back = self.times["any_backward" if _splits(choice.schedule) else "backward"]
        return [f + b for f, b in zip(self.times["forward"], back, strict=True)]


def _splits(name: str) -> bool:
    return name in ("zb-h1", "zb-v", "dualpipe-v")


@dataclass
class Search:
    """One question: ``profiles`` by size of a micro-batch, ``batch`` samples a step on ``machine``."""

    profiles: Mapping[int, Sequence[LayerProfile]]
    batch: int
    machine: Machine
    input_bytes: int = 0  # of one sample
    names: Sequence[str] = tuple(name for name in SIMPLEST if name not in POLICIES)
    replicas: Sequence[int] = (1,)
    checkpoints: Sequence[str] = CHECKPOINTS
    exact: bool = True
    simulated: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.models = {size: Model(layers, size * self.input_bytes) for size, layers in self.profiles.items()}
        self.layers = next(iter(self.models.values())).layers

    # --- what there is to choose from ---

    def choices(self) -> Iterator[Choice]:
        """All that are defined for these sizes."""
        for replicas in self.replicas:
            depth, share = self.machine.workers // replicas, -(-self.batch // replicas)
            for size in self.models:
                for name in self.names if size <= share else ():
                    yield from self._of(name, depth, replicas, size, -(-share // size))

    def _of(self, name: str, depth: int, replicas: int, size: int, chunks: int) -> Iterator[Choice]:
        fewest = schedules.fewest_virtual_stages(name)
        for virtual in VIRTUAL if schedules.suited_virtual_stages(name, 4) == 4 else (fewest,):
            if depth * virtual <= self.layers and chunks >= schedules.fewest_chunks(name, depth):
                for checkpoint in self.checkpoints:
                    yield Choice(name, depth, replicas, virtual, size, chunks, checkpoint)

    def bound(self, choice: Choice) -> float:
        """No cut of ``choice`` takes less.

        Worker w cannot begin before the forwards of those ahead, nor end before their backwards unless
        these are split; the least of the largest such sum is a geometric series. Recomputation keeps
        every worker busy, but can be hidden from the others, as weight gradients can.
        """
        model, chunks, cores = self.models[choice.micro_batch], choice.chunks, self.machine.cores or math.inf
        work, forward = model.least_work(choice)[-1], model.times["forward"][-1]
        if _splits(choice.schedule):
            chain = forward + model.times["any_gradient"][-1]
        elif choice.virtual_stages > 1:
            chain = work
        else:
            chain = work / (1 - (1 - 1 / chunks) ** choice.depth)
        total = chunks * (work + (forward if choice.checkpoint == "always" else 0.0))
        return max(chain, total / choice.depth, total * choice.replicas / cores)

    def _bound_of_cut(self, choice: Choice, ends: Sequence[int]) -> float:
        """The same for one cut."""
        model, placement = self.models[choice.micro_batch], choice.made().placement
        work, forward = model.least_work(choice), model.times["forward"]
        load, first = [0.0] * choice.depth, [math.inf] * choice.depth
        for stage, (start, stop) in enumerate(pairwise(ends)):
            worker = placement[stage]
            again = forward[stop] - forward[start] if choice.drops(stage) else 0.0
            load[worker] += work[stop] - work[start] + again
            first[worker] = min(first[worker], forward[start] if _splits(choice.schedule) else work[start])
        return max(ahead + choice.chunks * share for ahead, share in zip(first, load, strict=True))

    # --- what a choice comes to ---

    def memory(self, choice: Choice, ends: Sequence[int]) -> tuple[int, ...]:
        """Bytes by worker: parameters in all their copies, and the activations' peak."""
        model, schedule = self.models[choice.micro_batch], choice.made()
        parts = list(pairwise(ends))
        activations = [model.activations[b] - model.activations[a] for a, b in parts]
        drops: Drops = lambda stage, chunk: choice.drops(stage)  # noqa: E731
        peaks = peak_worker_bytes(schedule, activations, [model.inputs[a] for a, _ in parts], drops)
        return tuple(p + a for p, a in zip(self.fixed(choice, ends), peaks, strict=True))

    def fixed(self, choice: Choice, ends: Sequence[int]) -> list[int]:
        """Bytes by worker whatever the micro-batches."""
        model, held = self.models[choice.micro_batch], [0] * choice.depth
        for worker, (a, b) in zip(choice.made().placement, pairwise(ends), strict=True):
            held[worker] += copies(self.machine.moments) * (model.parameters[b] - model.parameters[a])
        return held

    def timeline(self, choice: Choice, balance: Sequence[int]) -> Timeline:
        """The step up to the gate, simulated."""
        model, machine, ends = self.models[choice.micro_batch], self.machine, [0, *accumulate(balance)]

        def of(name: str) -> list[float]:
            return [model.times[name][b] - model.times[name][a] for a, b in pairwise(ends)]

        forward = of("forward")
        return simulate(
            choice.made(),
            Costs(
                forward,
                of("input_gradient"),
                of("weight_gradient"),
                backward=of("backward"),
                latency=machine.latency,
                bandwidth=machine.bandwidth,
                output_bytes=[model.outputs[b - 1] for b in ends[1:]],
                recompute=[seconds * choice.drops(stage) for stage, seconds in enumerate(forward)],
                cores=None if machine.cores is None else machine.cores / choice.replicas,
            ),
        )

    def estimate(self, choice: Choice, balance: Sequence[int], memory: tuple[int, ...] | None = None) -> Estimate:
        """Simulate ``choice`` with this cut; ``seconds`` includes all-reduce and update."""
        model, ends = self.models[choice.micro_batch], [0, *accumulate(balance)]
        timeline = self.timeline(choice, balance)
        self.simulated += len(timeline.spans)
        done, updates, reduced = [0.0] * choice.depth, [0.0] * choice.depth, [0] * choice.depth
        for span in timeline.spans:
            done[span.worker] = max(done[span.worker], span.end)
        for worker, (a, b) in zip(choice.made().placement, pairwise(ends), strict=True):
            updates[worker] += model.times["update"][b] - model.times["update"][a]
            reduced[worker] += model.parameters[b] - model.parameters[a]
        gate = max(end + self.all_reduce(choice.replicas, size) for end, size in zip(done, reduced, strict=True))
        update = max(max(updates), sum(updates) * choice.replicas / (self.machine.cores or math.inf))
        return Estimate(
            choice, tuple(balance), gate + update, timeline.bubble,
            memory if memory is not None else self.memory(choice, ends),
        )  # fmt: skip

    def all_reduce(self, replicas: int, size: int) -> float:
        """Seconds of a ring over ``replicas``: 2(R - 1) messages of 1/R of the ``size`` in bytes."""
        steps = 2 * (replicas - 1)
        return steps * (self.machine.latency + size / replicas / self.machine.bandwidth)

    def fits(self, memory: Sequence[float]) -> bool:
        return max(memory) <= self.machine.memory

    # --- the search ---

    def best(self) -> Estimate | None:
        """The fastest that fits, or None. ``exact`` is False if not all could be tried."""
        found: Estimate | None = None
        for bound, _, choice in sorted((self.bound(c), SIMPLEST.index(c.schedule), c) for c in self.choices()):
            if found is not None and bound > found.seconds * _EQUAL:
                break
            if found is not None and self.simulated > _BUDGET:
                self.exact = False
                break
            found = self._best_cut(choice, found)
        return found if found is None or self.exact else self._moved(found)

    def _best_cut(self, choice: Choice, found: Estimate | None) -> Estimate | None:
        for balance in self._cuts(choice):
            ends = [0, *accumulate(balance)]
            if found is not None and self._bound_of_cut(choice, ends) > found.seconds * _EQUAL:
                continue
            if not self.fits(self.fixed(choice, ends)) or not self.fits(memory := self.memory(choice, ends)):
                continue
            estimate = self.estimate(choice, balance, memory)
            if estimate.beats(found):
                found = estimate
        return found

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
        model = self.models[choice.micro_batch]
        work = [b - a for a, b in pairwise(model.least_work(choice))]
        return cut(work, choice.stages, fits=None if self.machine.memory == math.inf else self._fitting(choice))

    def _fitting(self, choice: Choice) -> Callable[[int, int, int], bool]:
        model, limit = self.models[choice.micro_batch], self.machine.memory / choice.virtual_stages
        alive = _in_flight(choice.schedule, choice.depth, choice.chunks, choice.virtual_stages)
        held = copies(self.machine.moments)

        def fits(stage: int, a: int, b: int) -> bool:
            activations = model.activations[b] - model.activations[a]
            if choice.drops(stage):
                activations += alive[stage] * model.inputs[a]
            else:
                activations *= alive[stage]
            return held * (model.parameters[b] - model.parameters[a]) + activations <= limit

        return fits

    def _moved(self, found: Estimate) -> Estimate:
        """Move one border by a layer as long as that helps."""
        better = True
        while better and self.simulated < 2 * _BUDGET:
            better = False
            for stage in range(len(found.balance) - 1):
                for step in (1, -1):
                    sizes = list(found.balance)
                    sizes[stage] += step
                    sizes[stage + 1] -= step
                    if min(sizes) < 1 or not self.fits(memory := self.memory(found.choice, [0, *accumulate(sizes)])):
                        continue
                    estimate = self.estimate(found.choice, sizes, memory)
                    if estimate.beats(found):
                        found, better = estimate, True
        return found
