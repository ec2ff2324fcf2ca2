"""Seconds and bytes of a step for one way to run a model, by simulation.

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
from rpcpipe.planning.layer_cost import LayerCost
from rpcpipe.planning.loss_cost import SNAPSHOTS, LossCost, snapshot_bytes
from rpcpipe.planning.machine import Machine
from rpcpipe.planning.worker_memory import WorkerMemory, in_stream
from rpcpipe.schedules import Costs, Schedule, Timeline
from rpcpipe.schedules.weight_versions import Policy, choose

_TIMES = ("forward", "backward", "input_gradient", "weight_gradient", "update")
_IN_TURN = 2  # messages of one link at once
_LONG = 5  # steps of more than this many times the depth in micro-batches are extrapolated
EQUAL = 1 + 1e-9  # Step times within this relative tolerance count as equal.

# Of plans that are equally fast and large, the one whose schedule comes first is preferred.
SIMPLEST = schedules.planned()


@dataclass(frozen=True, order=True, kw_only=True)
class Candidate:
    """One way to run a model, but for the partition of its layers.

    ``depth`` workers form one pipeline, of which there are ``replicas``. ``sharded``: each replica holds
    only its part of the optimizer's state. ``undo``: whether there is a copy to take an update back from.
    ``weights``: the policy of an asynchronous schedule, None for its default.
    """

    schedule: str
    depth: int
    replicas: int
    virtual_stages: int
    micro_batch: int
    chunks: int
    checkpoint: str
    sharded: bool = False
    undo: str = "copy"
    weights: str | None = None

    @property
    def stages(self) -> int:
        """The number of stages of one pipeline."""
        return self.depth * self.virtual_stages

    @property
    def splits(self) -> bool:
        """Whether the schedule splits backwards."""
        return schedules.traits(self.schedule).splits

    @property
    def shards(self) -> int:
        """The number of parts of the optimizer's state, of which each replica has one."""
        return self.replicas if self.sharded else 1

    @property
    def placement(self) -> tuple[int, ...]:
        """The pipeline worker of every stage."""
        return _placement(self.schedule, self.depth, self.virtual_stages)

    @property
    def policy(self) -> Policy | None:
        """Which versions of the weights an asynchronous schedule uses; None for a synchronous one."""
        return choose(self.schedule, self.weights)

    def make_schedule(self) -> Schedule:
        """Return the schedule of one pipeline, long enough that a stream is full.

        Raises ScheduleError where it is not defined.
        """
        if self.policy is not None:
            return schedules.streamed(self.schedule, self.depth, self.chunks, -(-3 * self.depth // self.chunks))
        return _schedule(self.schedule, self.depth, self.chunks, self.virtual_stages)

    def drops(self, stage: int) -> bool:
        """Return whether the stage's activations are recomputed."""
        return self.checkpoint == "always" or (self.checkpoint == "except_last" and stage < self.stages - 1)

    def shorter(self) -> tuple[Candidate, Candidate] | None:
        """Return the two steps, ``depth`` micro-batches apart, from which a long one is extrapolated; else None."""
        rest = self.chunks % self.depth
        # Of so many rounds each may be longer by one; both steps need two rounds of ordinary length beside them.
        rounds = max(3, rest + 2) if schedules.traits(self.schedule).lengthens_rounds else 3
        if self.chunks <= (_LONG + rounds - 3) * self.depth:
            return None
        first = rounds * self.depth + rest
        return replace(self, chunks=first), replace(self, chunks=first + self.depth)


_placement = functools.lru_cache(maxsize=1024)(schedules.placement)


@functools.lru_cache(maxsize=256)
def _schedule(name: str, workers: int, chunks: int, virtual: int) -> Schedule:
    return schedules.get(name, workers, chunks, virtual)


def _extrapolated(
    long: Candidate, first: Candidate, second: Candidate, before: Sequence[float], after: Sequence[float]
) -> tuple[float, ...]:
    """Return the figures of ``long`` from those of ``first`` (``before``) and ``second`` (``after``)."""
    further = (long.chunks - second.chunks) / (second.chunks - first.chunks)
    return tuple(b + further * (b - a) for a, b in zip(before, after, strict=True))


@dataclass(frozen=True)
class Estimate:
    """The predicted figures of a candidate with one partition: seconds a step, bubble, bytes by pipeline worker."""

    candidate: Candidate
    balance: tuple[int, ...]
    seconds: float
    bubble: float
    memory: tuple[float, ...]

    def beats(self, other: Estimate | None) -> bool:
        """Return whether this is faster; where equally fast, whether it is not sharded, then smaller, then simpler."""
        if other is None or self.seconds * EQUAL < other.seconds:
            return True
        return self.seconds <= other.seconds * EQUAL and self._tie() < other._tie()

    def _tie(self) -> tuple[bool, float, int]:
        return self.candidate.sharded, max(self.memory), SIMPLEST.index(self.candidate.schedule)


class LayerSums:
    """Prefix sums over the layers' costs for one size of micro-batch: a range of layers costs a difference of two."""

    def __init__(self, layers: Sequence[LayerCost], input_bytes: int, moments: int) -> None:
        self.layers = len(layers)
        self.outputs = [layer.output_bytes for layer in layers]
        self.inputs = [input_bytes, *self.outputs]
        columns = {name: [float(getattr(layer, name)) for layer in layers] for name in _TIMES}
        halves = list(zip(columns["input_gradient"], columns["weight_gradient"], columns["backward"], strict=True))
        # Lower bounds where a schedule splits some backwards: of the whole, and of what the stage before waits for.
        columns["any_backward"] = [min(i + w, whole) for i, w, whole in halves]
        columns["any_gradient"] = [min(i, whole) for i, _, whole in halves]
        self.times = {name: [0.0, *accumulate(column)] for name, column in columns.items()}
        self.activations = [0, *accumulate(layer.activation_bytes for layer in layers)]
        self.parameters = [0, *accumulate(layer.parameter_bytes for layer in layers)]
        states = (layer.state_bytes for layer in layers)
        moment_bytes = (moments * layer.parameter_bytes for layer in layers)
        self.states = [0, *accumulate(m if s is None else s for s, m in zip(states, moment_bytes, strict=True))]
        self._single = [max(layer.peak_bytes, layer.activation_bytes) for layer in layers]
        self._peaks: dict[int, list[int]] = {}

    def single_peak(self, start: int, stop: int) -> int:
        """Return the most bytes that one micro-batch has at once in these layers, whose backward begins at the end."""
        if start not in self._peaks:
            before = self.activations[start]
            alone = (self.activations[at] - before + self._single[at] for at in range(start, self.layers))
            self._peaks[start] = list(accumulate(alone, max))
        return self._peaks[start][stop - start - 1] if stop > start else 0

    def held(self, candidate: Candidate, start: int, stop: int) -> WorkerMemory:
        """Return what a worker with these layers holds whatever the micro-batches."""
        weights, state = (float(sums[stop] - sums[start]) for sums in (self.parameters, self.states))
        shards = candidate.shards
        copy = (weights + state) / shards if candidate.undo == "copy" else 0.0
        return WorkerMemory(weights=weights, gradients=weights, optimizer=state / shards, copy=copy)

    def least_work(self, candidate: Candidate) -> list[float]:
        """Return prefix sums of the least seconds a micro-batch takes, whether its backward is split or not.

        Without recomputation, which may overlap with a wait.
        """
        back = self.times["any_backward" if candidate.splits else "backward"]
        return [f + b for f, b in zip(self.times["forward"], back, strict=True)]


@dataclass
class CostModel:
    """Predictions for one model, given its ``layer_costs`` by size of micro-batch, on one machine.

    ``input_bytes`` are those of one sample. ``work_done`` counts the actions of all schedules examined.
    """

    layer_costs: Mapping[int, Sequence[LayerCost]]
    machine: Machine
    input_bytes: int = 0
    work_done: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.sums = {
            size: LayerSums(layers, size * self.input_bytes, self.machine.moments)
            for size, layers in self.layer_costs.items()
        }
        self.layers = next(iter(self.sums.values())).layers
        self._in_flight: dict[tuple[str, int, int, int], tuple[int, ...]] = {}

    def in_flight(self, candidate: Candidate) -> tuple[float, ...]:
        """Return by stage the most micro-batches whose activations are alive at once."""
        if (shorter := candidate.shorter()) is not None:
            return _extrapolated(candidate, *shorter, *(self.in_flight(short) for short in shorter))
        key = candidate.schedule, candidate.depth, candidate.chunks, candidate.virtual_stages
        if key not in self._in_flight:
            schedule = candidate.make_schedule()
            self.work_done += sum(map(len, schedule.actions))
            self._in_flight[key] = peak_activation_bytes(schedule, [1] * schedule.stages, [0] * schedule.stages)
        return self._in_flight[key]

    def memory(self, candidate: Candidate, ends: Sequence[int]) -> tuple[float, ...]:
        """Return bytes by worker. Stage k has the layers ``ends[k]`` … ``ends[k + 1] - 1``."""
        return tuple(worker.total for worker in self.parts(candidate, ends))

    def parts(self, candidate: Candidate, ends: Sequence[int]) -> tuple[WorkerMemory, ...]:
        """Return what the workers' bytes are."""
        messages = self._messages(candidate, ends)
        return tuple(
            replace(held, activations=activations, working=whole - activations, messages=sent)
            for held, activations, whole, sent in zip(
                self.parameter_memory(candidate, ends), *self._peaks(candidate, ends), messages, strict=True
            )
        )

    def _peaks(self, candidate: Candidate, ends: Sequence[int]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return by worker the peak of activations, without and with what a backward has beside them."""
        if (shorter := candidate.shorter()) is not None:
            before, after = (self._peaks(short, ends) for short in shorter)
            alone, whole = (_extrapolated(candidate, *shorter, b, a) for b, a in zip(before, after, strict=True))
            return alone, whole
        sums, schedule = self.sums[candidate.micro_batch], candidate.make_schedule()
        parts = list(pairwise(ends))
        activations = [sums.activations[b] - sums.activations[a] for a, b in parts]
        working = [sums.single_peak(a, b) - own for (a, b), own in zip(parts, activations, strict=True)]
        drops: Drops = lambda stage, chunk: candidate.drops(stage)  # noqa: E731
        self.work_done += sum(map(len, schedule.actions))
        alone, whole = peak_worker_bytes(schedule, activations, [sums.inputs[a] for a, _ in parts], working, drops)
        if candidate.policy is not None and not candidate.policy.by_batch:
            # Every backward makes the stage's gradients anew, while the activations of its micro-batch go.
            gone = [
                min(size, sums.parameters[b] - sums.parameters[a])
                for size, (a, b) in zip(activations, parts, strict=True)
            ]
            alone, whole = (
                tuple(size - less for size, less in zip(sizes, gone, strict=True)) for sizes in (alone, whole)
            )
        return alone, whole

    def parameter_memory(self, candidate: Candidate, ends: Sequence[int]) -> list[WorkerMemory]:
        """Return by worker what it holds whatever the micro-batches."""
        sums, policy = self.sums[candidate.micro_batch], candidate.policy
        held = [sums.held(candidate, 0, 0)] * candidate.depth
        for stage, (worker, (a, b)) in enumerate(zip(candidate.placement, pairwise(ends), strict=True)):
            own = sums.held(candidate, a, b)
            if policy is not None:
                own = in_stream(
                    own, policy.behind(stage, candidate.stages), policy.stashes, self.machine.healing.workers
                )
            held[worker] = held[worker].plus(own)
        if not self.machine.healing.hosts or policy is not None:
            return held
        snapshots = self._snapshots(candidate, held, self.machine.healing.hosts)
        return [replace(own, snapshots=size) for own, size in zip(held, snapshots, strict=True)]

    def _snapshots(self, candidate: Candidate, held: Sequence[WorkerMemory], hosts: Sequence[str]) -> list[float]:
        """Return by worker of a replica the most bytes of snapshots in any; ``hosts``: of all workers."""
        replicas = candidate.replicas
        state = [worker.weights + worker.optimizer for worker in held for _ in range(replicas)]
        more = (f"host of worker {index}" for index in range(len(hosts), len(state)))  # of a longer pipeline
        sizes = snapshot_bytes(state, (*hosts, *more)[: len(state)])
        return [max(sizes[at : at + replicas]) for at in range(0, len(sizes), replicas)]

    def least_bytes(self, candidate: Candidate, start: int, stop: int) -> float:
        """Return the bytes of these layers whatever the micro-batches, and of their snapshots, wherever those lie."""
        held = self.sums[candidate.micro_batch].held(candidate, start, stop)
        hosts = self.machine.healing.hosts[: candidate.depth * candidate.replicas]
        return held.total + SNAPSHOTS * (held.weights + held.optimizer) * (len(set(hosts)) > 1)

    def _messages(self, candidate: Candidate, ends: Sequence[int]) -> list[float]:
        """Return by worker the bytes of messages: each link has one under way and one that is being read or written."""
        sums, sent = self.sums[candidate.micro_batch], [0.0] * candidate.depth
        for (one, other), border in zip(pairwise(candidate.placement), ends[1:], strict=False):
            for worker in (one, other) if one != other else ():
                sent[worker] += 2 * _IN_TURN * sums.outputs[border - 1]  # there, and the gradient back
        return sent

    def loss_of(self, estimate: Estimate) -> LossCost:
        """Return what the loss of a worker costs."""
        candidate, machine = estimate.candidate, self.machine
        held = self.parameter_memory(candidate, [0, *accumulate(estimate.balance)])
        state = [worker.weights + worker.optimizer for worker in held]
        each = [str(worker) for worker in range(candidate.depth * candidate.replicas)]
        snapshots = self._snapshots(candidate, held, machine.healing.hosts or each)
        return LossCost.of(estimate.seconds, state, snapshots, machine.latency, machine.bandwidth)

    def timeline(self, candidate: Candidate, balance: Sequence[int]) -> Timeline:
        """Simulate the step without the updates, with ``balance[k]`` layers in stage k."""
        timeline = candidate.make_schedule().simulate(self._costs(candidate, [0, *accumulate(balance)]))
        self.work_done += len(timeline.spans)
        return timeline

    def _costs(self, candidate: Candidate, ends: Sequence[int]) -> Costs:
        sums, machine = self.sums[candidate.micro_batch], self.machine

        def by_stage(name: str) -> list[float]:
            return [sums.times[name][b] - sums.times[name][a] for a, b in pairwise(ends)]

        forward, outputs = by_stage("forward"), [sums.outputs[b - 1] for b in ends[1:]]
        return Costs(
            forward,
            by_stage("input_gradient"),
            by_stage("weight_gradient"),
            backward=by_stage("backward"),
            latency=machine.latency,
            bandwidth=machine.bandwidth,
            output_bytes=outputs,
            recompute_seconds=[seconds * candidate.drops(stage) for stage, seconds in enumerate(forward)],
            action_overhead=machine.overheads.action,
            send_overhead=[machine.overheads.sending(size) for size in outputs],
            receive_overhead=machine.overheads.message,
            cores=None if machine.cores is None else machine.cores / candidate.replicas,
        )

    def estimate(
        self, candidate: Candidate, balance: Sequence[int], memory: tuple[float, ...] | None = None
    ) -> Estimate:
        """Simulate ``candidate`` with this partition; the estimate's seconds include all-reduce and update.

        ``memory``: bytes by worker, where they are already computed.
        """
        ends = [0, *accumulate(balance)]
        memory = self.memory(candidate, ends) if memory is None else memory
        updated, makespan, busy, idle, actions = self._times(candidate, balance)
        seconds = updated + self._around(candidate, idle, actions)
        return Estimate(candidate, tuple(balance), seconds, 1 - busy / (candidate.depth * makespan), memory)

    def _times(self, candidate: Candidate, balance: Sequence[int]) -> tuple[float, ...]:
        """Return figures of one pipeline that grow evenly with the number of micro-batches.

        These are, in seconds, the time at which all workers have updated, the makespan, the work of all workers and
        their idle time before their first actions; and the number of actions.
        """
        if (shorter := candidate.shorter()) is not None:
            return _extrapolated(candidate, *shorter, *(self._times(short, balance) for short in shorter))
        timeline = self.timeline(candidate, balance)
        first = [math.inf] * candidate.depth
        for span in timeline.spans:
            first[span.worker] = min(first[span.worker], span.start)
        updated = self._updated(candidate, [0, *accumulate(balance)], timeline)
        return updated, timeline.makespan, sum(timeline.busy), sum(first), len(timeline.spans)

    def _around(self, candidate: Candidate, idle: float, actions: float) -> float:
        """Return the seconds of the step beside its timeline and its update, where pipelines have ``actions`` each."""
        workers, cores = candidate.depth * candidate.replicas, self.machine.cores or math.inf
        waiting = idle * candidate.replicas if workers <= cores else 0.0
        return self.machine.overheads.around(actions * candidate.replicas, waiting, min(workers, cores))

    def least_around(self, candidate: Candidate) -> float:
        """Return the seconds that the step takes at least beside its timeline: no backward split, dispatch hidden."""
        actions = 2 * candidate.stages * candidate.chunks * candidate.replicas
        return self.machine.overheads.around(actions, math.inf, 1)

    def _updated(self, candidate: Candidate, ends: Sequence[int], timeline: Timeline) -> float:
        """Return the time at which the last worker has updated, in seconds.

        The workers of one pipeline update alone, as those of ``Costs.update_alone``: training does not clip. Replicas
        first reduce their gradients, and wait for the last one that does (the gate).
        """
        done, sums, cores = [0.0] * candidate.depth, self.sums[candidate.micro_batch], self.machine.cores or math.inf
        reduced, updates = [0] * candidate.depth, [0.0] * candidate.depth
        for span in timeline.spans:
            done[span.worker] = max(done[span.worker], span.end)
        for worker, (a, b) in zip(candidate.placement, pairwise(ends), strict=True):
            reduced[worker] += sums.parameters[b] - sums.parameters[a]
            updates[worker] += sums.times["update"][b] - sums.times["update"][a]
        if candidate.replicas == 1 and candidate.depth <= cores:
            return max(end + update for end, update in zip(done, updates, strict=True))
        gate = max(end + self.all_reduce(candidate.replicas, size) for end, size in zip(done, reduced, strict=True))
        # Where they share too few cores, the updates of all count, as if none had begun before.
        return gate + max(max(updates), sum(updates) * candidate.replicas / cores)

    def all_reduce(self, replicas: int, size: float) -> float:
        """Return the seconds of a ring over ``replicas``: 2(R - 1) messages of 1/R of the ``size`` in bytes."""
        steps = 2 * (replicas - 1)
        return steps * (self.machine.latency + size / replicas / self.machine.bandwidth)
