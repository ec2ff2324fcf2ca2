"""What a way to run a model comes to, in seconds and bytes, before anything runs: simulated, never guessed.

A step of very many micro-batches is extrapolated from two shorter ones: once all workers are busy, a
schedule repeats itself every ``depth`` micro-batches.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

from rpcpipe import schedules
from rpcpipe.planning.activation_peaks import Drops, peak_activation_bytes, peak_worker_bytes
from rpcpipe.planning.layer_cost import LayerProfile, copies
from rpcpipe.schedules import Costs, Schedule, Timeline

_TIMES = ("forward", "backward", "input_gradient", "weight_gradient", "update")
_LONG = 5  # steps of more micro-batches than so many times the depth are extrapolated
EQUAL = 1 + 1e-9  # up to so much longer is as fast

# The simplest first: what to take where two are equally fast and large.
SIMPLEST = ("1f1b", "gpipe", "eager-1f1b", "interleaved", "looped-bfs", "zb-h1", "zb-v", "dualpipe-v", "naive")


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


@dataclass(frozen=True, order=True)
class Choice:
    """All but the cut. ``depth`` workers are one pipeline, of which there are ``replicas``.

    ``sharded``: each has only its part of the optimizer's state.
    """

    schedule: str
    depth: int
    replicas: int
    virtual_stages: int
    micro_batch: int
    chunks: int
    checkpoint: str
    sharded: bool = False

    @property
    def stages(self) -> int:
        return self.depth * self.virtual_stages

    @property
    def splits(self) -> bool:
        """Does the schedule split backwards?"""
        return self.schedule in ("zb-h1", "zb-v", "dualpipe-v")

    def copies(self, moments: int) -> float:
        """Of its parameters on a worker."""
        return copies(moments, self.replicas if self.sharded else 1)

    @property
    def placement(self) -> tuple[int, ...]:
        """The pipeline worker of every stage."""
        return _placement(self.schedule, self.depth, self.virtual_stages)

    def made(self) -> Schedule:
        return _schedule(self.schedule, self.depth, self.chunks, self.virtual_stages)

    def drops(self, stage: int) -> bool:
        """Are the stage's activations recomputed?"""
        return self.checkpoint == "always" or (self.checkpoint == "except_last" and stage < self.stages - 1)

    def shorter(self) -> tuple[Choice, Choice] | None:
        """The two steps from which this long one is extrapolated, ``depth`` micro-batches apart."""
        if self.chunks <= _LONG * self.depth:
            return None
        first = 3 * self.depth + self.chunks % self.depth
        return replace(self, chunks=first), replace(self, chunks=first + self.depth)


_placement = functools.lru_cache(maxsize=1024)(schedules.placement)


@functools.lru_cache(maxsize=256)
def _schedule(name: str, workers: int, chunks: int, virtual: int) -> Schedule:
    return schedules.get(name, workers, chunks, virtual)


def _extrapolated(
    long: Choice, first: Choice, second: Choice, before: Sequence[float], after: Sequence[float]
) -> tuple[float, ...]:
    further = (long.chunks - second.chunks) / (second.chunks - first.chunks)
    return tuple(b + further * (b - a) for a, b in zip(before, after, strict=True))


@dataclass(frozen=True)
class Estimate:
    """What a choice and a cut come to: seconds a step, bubble, bytes by pipeline worker."""

    choice: Choice
    balance: tuple[int, ...]
    seconds: float
    bubble: float
    memory: tuple[float, ...]

    def beats(self, other: Estimate | None) -> bool:
        """Faster; where equally fast, not sharded, then smaller, then simpler."""
        if other is None or self.seconds * EQUAL < other.seconds:
            return True
        return self.seconds <= other.seconds * EQUAL and self._tie() < other._tie()

    def _tie(self) -> tuple[bool, float, int]:
        return self.choice.sharded, max(self.memory), SIMPLEST.index(self.choice.schedule)


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
        back = self.times["any_backward" if choice.splits else "backward"]
        return [f + b for f, b in zip(self.times["forward"], back, strict=True)]


@dataclass
class Estimator:
    """Estimates for one model, ``profiles`` by size of a micro-batch, on one machine."""

    profiles: Mapping[int, Sequence[LayerProfile]]
    machine: Machine
    input_bytes: int = 0  # of one sample
    looked_at: int = field(default=0, init=False)  # actions, of all schedules

    def __post_init__(self) -> None:
        self.models = {size: Model(layers, size * self.input_bytes) for size, layers in self.profiles.items()}
        self.layers = next(iter(self.models.values())).layers
        self._alive: dict[tuple[str, int, int, int], tuple[int, ...]] = {}

    def in_flight(self, choice: Choice) -> tuple[float, ...]:
        """Micro-batches per stage whose activations are alive at once, at most."""
        if (shorter := choice.shorter()) is not None:
            return _extrapolated(choice, *shorter, *(self.in_flight(short) for short in shorter))
        key = choice.schedule, choice.depth, choice.chunks, choice.virtual_stages
        if key not in self._alive:
            schedule = choice.made()
            self.looked_at += sum(map(len, schedule.actions))
            self._alive[key] = peak_activation_bytes(schedule, [1] * schedule.stages, [0] * schedule.stages)
        return self._alive[key]

    def memory(self, choice: Choice, ends: Sequence[int]) -> tuple[float, ...]:
        """Bytes by worker: parameters in all their copies, and the activations' peak."""
        if (shorter := choice.shorter()) is not None:
            return _extrapolated(choice, *shorter, *(self.memory(short, ends) for short in shorter))
        model, schedule = self.models[choice.micro_batch], choice.made()
        parts = list(pairwise(ends))
        activations = [model.activations[b] - model.activations[a] for a, b in parts]
        drops: Drops = lambda stage, chunk: choice.drops(stage)  # noqa: E731
        self.looked_at += sum(map(len, schedule.actions))
        peaks = peak_worker_bytes(schedule, activations, [model.inputs[a] for a, _ in parts], drops)
        return tuple(p + a for p, a in zip(self.fixed(choice, ends), peaks, strict=True))

    def fixed(self, choice: Choice, ends: Sequence[int]) -> list[float]:
        """Bytes by worker whatever the micro-batches."""
        model, held = self.models[choice.micro_batch], [0.0] * choice.depth
        for worker, (a, b) in zip(choice.placement, pairwise(ends), strict=True):
            held[worker] += choice.copies(self.machine.moments) * (model.parameters[b] - model.parameters[a])
        return held

    def timeline(self, choice: Choice, balance: Sequence[int]) -> Timeline:
        """The step up to the gate, simulated."""
        model, machine, ends = self.models[choice.micro_batch], self.machine, [0, *accumulate(balance)]

        def of(name: str) -> list[float]:
            return [model.times[name][b] - model.times[name][a] for a, b in pairwise(ends)]

        forward = of("forward")
        timeline = choice.made().simulate(
            Costs(
                forward,
                of("input_gradient"),
                of("weight_gradient"),
                backward=of("backward"),
                latency=machine.latency,
                bandwidth=machine.bandwidth,
                output_bytes=[model.outputs[b - 1] for b in ends[1:]],
                recompute_seconds=[seconds * choice.drops(stage) for stage, seconds in enumerate(forward)],
                cores=None if machine.cores is None else machine.cores / choice.replicas,
            ),
        )
        self.looked_at += len(timeline.spans)
        return timeline

    def estimate(self, choice: Choice, balance: Sequence[int], memory: tuple[float, ...] | None = None) -> Estimate:
        """Simulate ``choice`` with this cut; ``seconds`` includes all-reduce and update."""
        memory = self.memory(choice, [0, *accumulate(balance)]) if memory is None else memory
        seconds, makespan, busy = self._times(choice, balance)
        return Estimate(choice, tuple(balance), seconds, 1 - busy / (choice.depth * makespan), memory)

    def _times(self, choice: Choice, balance: Sequence[int]) -> tuple[float, ...]:
        """Seconds of the step and of its schedule alone, and those in which a worker is busy, summed."""
        if (shorter := choice.shorter()) is not None:
            return _extrapolated(choice, *shorter, *(self._times(short, balance) for short in shorter))
        timeline, ends = self.timeline(choice, balance), [0, *accumulate(balance)]
        seconds = self._gate(choice, ends, timeline) + self._update(choice, ends)
        return seconds, timeline.makespan, sum(timeline.busy)

    def _gate(self, choice: Choice, ends: Sequence[int], timeline: Timeline) -> float:
        """When the last worker's gradients are reduced."""
        done, parameters = [0.0] * choice.depth, self.models[choice.micro_batch].parameters
        reduced = [0] * choice.depth
        for span in timeline.spans:
            done[span.worker] = max(done[span.worker], span.end)
        for worker, (a, b) in zip(choice.placement, pairwise(ends), strict=True):
            reduced[worker] += parameters[b] - parameters[a]
        return max(end + self.all_reduce(choice.replicas, size) for end, size in zip(done, reduced, strict=True))

    def _update(self, choice: Choice, ends: Sequence[int]) -> float:
        times, updates = self.models[choice.micro_batch].times["update"], [0.0] * choice.depth
        for worker, (a, b) in zip(choice.placement, pairwise(ends), strict=True):
            updates[worker] += times[b] - times[a]
        return max(max(updates), sum(updates) * choice.replicas / (self.machine.cores or math.inf))

    def all_reduce(self, replicas: int, size: float) -> float:
        """Seconds of a ring over ``replicas``: 2(R - 1) messages of 1/R of the ``size`` in bytes."""
        steps = 2 * (replicas - 1)
        return steps * (self.machine.latency + size / replicas / self.machine.bandwidth)
