"""A candidate's estimate, against the plain simulation."""

from __future__ import annotations

import dataclasses
import math
import random
from itertools import accumulate
from typing import Any

import pytest

import rpcpipe.planning.cost_model
from rpcpipe import schedules
from rpcpipe.planning import CostModel, LayerCost
from rpcpipe.planning.cost_model import SIMPLEST, Candidate
from rpcpipe.planning.loss_cost import Healing
from rpcpipe.planning.machine import Machine
from rpcpipe.planning.overheads import Overheads
from support.layer_costs import layer


def cost_model(machine: Machine, **replaced: float) -> CostModel:
    source = random.Random(3)
    layers = [dataclasses.replace(layer(source, str(at)), **replaced) for at in range(16)]  # type: ignore[arg-type]
    return CostModel({1: layers}, machine, input_bytes=5)


def way(schedule: str, depth: int, chunks: int, **others: Any) -> Candidate:
    others = {"replicas": 1, "virtual_stages": 1, "micro_batch": 1, "checkpoint": "never"} | others
    return Candidate(schedule=schedule, depth=depth, chunks=chunks, **others)


@pytest.mark.parametrize("name", SIMPLEST)
@pytest.mark.parametrize("chunks", [80, 83])
def test_a_long_step_is_extrapolated_rightly(name: str, chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = cost_model(Machine(4, latency=0.01, overheads=Overheads(1.0, 0.02, 0.05, 0.01, 0.02, 0.001)))
    virtual = schedules.fewest_virtual_stages(name)
    candidate = way(name, 4, chunks, virtual_stages=virtual, checkpoint="except_last")
    balance = [16 // (4 * virtual)] * (4 * virtual)
    quick = costs.estimate(candidate, balance)
    assert costs.work_done < 0.75 * 6 * chunks * 4 * virtual
    monkeypatch.setattr(rpcpipe.planning.cost_model, "_LONG", math.inf)
    full = costs.estimate(candidate, balance)
    assert quick.memory == pytest.approx(full.memory)
    assert quick.seconds == pytest.approx(full.seconds, rel=5e-3)
    assert quick.bubble == pytest.approx(full.bubble, abs=5e-3)


def test_replicas_reduce_before_the_gate() -> None:
    """A ring of R sends every worker 2(R - 1)/R times its gradients. No update: one pipeline has no gate before it."""
    costs = cost_model(Machine(4, bandwidth=100.0), update=0.0)
    one, two = (way("1f1b", 2, 8, replicas=replicas) for replicas in (1, 2))
    alone, together = (costs.estimate(candidate, [8, 8]) for candidate in (one, two))
    parameters = [0, *accumulate(layer.parameter_bytes for layer in costs.layer_costs[1])]
    reduced = [(parameters[b] - parameters[a]) / 100.0 for a, b in ((0, 8), (8, 16))]
    assert min(reduced) - 1e-9 <= together.seconds - alone.seconds <= max(reduced) + 1e-9
    assert alone.memory == together.memory


def test_replicas_share_the_cores() -> None:
    alone, crowded = (
        cost_model(Machine(4, cores=cores)).estimate(way("gpipe", 2, 8, replicas=2), [8, 8])
        for cores in (4, 2)
    )  # fmt: skip
    assert 1.5 < crowded.seconds / alone.seconds <= 2.0


def test_a_step_has_more_to_it_than_its_timeline() -> None:
    """Two stages, two micro-batches, one second of latency: 2 x 2 x 2 actions, and worker 1 waits for its first."""
    bare = Machine(2, latency=1.0)
    candidate = way("gpipe", 2, 2)
    plain = cost_model(bare).estimate(candidate, [8, 8])
    first = sum(layer.forward for layer in cost_model(bare).layer_costs[1][:8]) + 1.0

    def more(overheads: Overheads) -> float:
        machine = dataclasses.replace(bare, overheads=overheads)
        return cost_model(machine).estimate(candidate, [8, 8]).seconds - plain.seconds

    assert more(Overheads()) == 0.0
    assert more(Overheads(step=3.0, call=0.5)) == pytest.approx(3.0 + 8 * 0.5)
    assert more(Overheads(dispatch=first / 8)) == pytest.approx(0.0)  # while worker 1 waits
    assert more(Overheads(dispatch=first / 8 + 1)) == pytest.approx(8 / 2)  # of each of the two cores
    sizes = [layer.output_bytes for layer in cost_model(bare).layer_costs[1]]
    # There and back on the critical path: sending costs each byte, too. Every second message is hidden.
    assert more(Overheads(copy=0.001)) >= 2 * 0.001 * sizes[7] - 1e-9
    assert more(Overheads(message=0.25)) >= 4 * 0.25 - 1e-9


@pytest.mark.parametrize(("replicas", "cores", "more"), [(1, None, 3 * 8), (1, 2, 3 * 8), (2, None, 5 * 8), (1, 1, 64)])
def test_a_pipeline_updates_without_a_gate(replicas: int, cores: int | None, more: float) -> None:
    """Worker 1, with slow updates, ends long before worker 0: 3 s for each layer of worker 0, 5 s of worker 1."""
    candidate, machine = way("1f1b", 2, 4, replicas=replicas), Machine(2 * replicas, cores=cores)

    def seconds(updates: tuple[float, float]) -> float:
        layers = [
            dataclasses.replace(one, backward=100.0 if at < 8 else 1.0, update=updates[at // 8])
            for at, one in enumerate(cost_model(machine).layer_costs[1])
        ]
        return CostModel({1: layers}, machine, input_bytes=5).estimate(candidate, [8, 8]).seconds

    assert seconds((3.0, 5.0)) - seconds((0.0, 0.0)) == pytest.approx(more)


LAYERS = [
    LayerCost(str(at), 1.0, 2.0, 1.0, 1.0, 10 + at, 100, 7, state_bytes=states, peak_bytes=peak)
    for at, (states, peak) in enumerate([(None, 0), (300, 0), (0, 40), (200, 0)])
]


@pytest.mark.parametrize("undo", ["copy", "off"])
@pytest.mark.parametrize("sharded", [False, True])
def test_the_parts_of_a_workers_memory(undo: str, sharded: bool) -> None:
    """By hand: gpipe with 3 micro-batches on workers of layers 0, 1 and 2, 3; Adam where no state was measured."""
    costs = CostModel({1: LAYERS}, Machine(4), input_bytes=5)
    first, last = costs.parts(way("gpipe", 2, 3, replicas=2, sharded=sharded, undo=undo), [0, 2, 4])
    shards = 2 if sharded else 1
    assert (first.weights, first.gradients, first.optimizer) == (200, 200, (200 + 300) / shards)
    assert (last.weights, last.gradients, last.optimizer) == (200, 200, (0 + 200) / shards)
    assert first.copy == ((200 + 500) / shards if undo == "copy" else 0)
    assert first.activations == 3 * (10 + 11)
    assert last.activations == 3 * (12 + 13)
    # Of the last micro-batch's backward: layer 1 has no more than it keeps; layer 2 does, while 3 has none any more.
    assert (first.working, last.working) == (0, 40 - (12 + 13))
    assert first.messages == last.messages == 2 * 2 * 7
    assert first.total == sum((first.weights, first.gradients, first.optimizer, first.copy, 63, 0, 28))


def test_recomputation_has_one_micro_batch_at_once() -> None:
    costs = CostModel({1: LAYERS}, Machine(2), input_bytes=5)
    first, last = costs.parts(way("gpipe", 2, 3, checkpoint="always"), [0, 2, 4])
    assert first.activations == 2 * 5 + (10 + 11)
    assert last.activations == 2 * 7 + (12 + 13)


STREAMED = [LayerCost(str(at), 1.0, 2.0, 1.0, 1.0, 30 + at, 100 * (at + 1), 7, state_bytes=10) for at in range(3)]
# By schedule and policy, and by stage of three: versions that are stashed, and how many updates old weights are.
BEHIND = {
    ("pipedream", "stash"): ([2, 1, 0], [2, 1, 0]),
    ("pipedream", "vertical_sync"): ([2, 2, 2], [2, 2, 2]),
    ("pipedream", "latest"): ([0, 0, 0], [2, 1, 0]),
    ("pipedream-2bw", None): ([1, 1, 1], [1, 1, 1]),
}


@pytest.mark.parametrize("heals", [True, False])
@pytest.mark.parametrize(("schedule", "weights"), BEHIND)
def test_the_parts_of_a_stream(schedule: str, weights: str | None, heals: bool) -> None:
    """By hand: stage r of 3 has 3 - r micro-batches under way, two copies to go back to, and versions of its weights.

    The activations of a micro-batch go as the gradients of its weights come, where these are of one micro-batch.
    """
    costs = CostModel({1: STREAMED}, Machine(3, healing=Healing(heals)), input_bytes=5)
    workers = costs.parts(way(schedule, 3, 4, weights=weights), [0, 1, 2, 3])
    for stage, (worker, stashed, behind) in enumerate(zip(workers, *BEHIND[schedule, weights], strict=True)):
        size = 100 * (stage + 1)
        assert (worker.weights, worker.gradients, worker.optimizer, worker.copy) == (size, size, 10, 2 * (size + 10))
        copied = 2 * behind + (stashed > 0) if heals else 0
        assert worker.versions == (stashed + copied) * size
        gone = 0 if schedule == "pipedream-2bw" else 30 + stage
        assert worker.activations == (3 - stage) * (30 + stage) - gone
        assert worker.snapshots == 0


def test_a_streams_gradients_take_no_more_than_the_activations_leave() -> None:
    layers = [dataclasses.replace(one, activation_bytes=1000) for one in STREAMED]
    costs = CostModel({1: layers}, Machine(3), input_bytes=5)
    first = costs.parts(way("pipedream", 3, 1), [0, 1, 2, 3])[0]  # batches of one micro-batch fill the pipeline, too
    assert first.activations + first.gradients == 3 * 1000


@pytest.mark.parametrize("sharded", [False, True])
def test_snapshots_for_lost_hosts_are_a_part_of_the_memory(sharded: bool) -> None:
    """By hand: two replicas of three workers, in the pipeline's order on hosts a a b b c c; each state is there twice.

    So every worker is its own, and that of the host before: c, a, b.
    """
    hosts = ("a", "a", "b", "b", "c", "c")
    costs = CostModel({1: STREAMED}, Machine(6, healing=Healing(hosts=hosts)), input_bytes=5)
    bare = CostModel({1: STREAMED}, Machine(6), input_bytes=5)
    candidate = way("1f1b", 3, 4, replicas=2, sharded=sharded)
    workers, without = costs.parts(candidate, [0, 1, 2, 3]), bare.parts(candidate, [0, 1, 2, 3])
    state = [size + (5 if sharded else 10) for size in (100, 200, 300)]
    expected = [2 * (state[0] + state[2]), 2 * (state[1] + state[0]), 2 * (state[2] + state[1])]
    assert [worker.snapshots for worker in workers] == expected
    for worker, alone, size in zip(workers, without, expected, strict=True):
        assert (alone.snapshots, worker.total) == (0, alone.total + size)
    # Whoever plans for them counts them, and says them once.
    found = costs.loss_of(costs.estimate(candidate, [1, 1, 1]))
    assert found.snapshot_bytes == tuple(expected)
