"""A candidate's estimate, against the plain simulation."""

from __future__ import annotations

import dataclasses
import math
import random
from itertools import accumulate

import pytest

import rpcpipe.planning.cost_model
from rpcpipe import schedules
from rpcpipe.planning import CostModel
from rpcpipe.planning.cost_model import SIMPLEST, Candidate, Machine
from rpcpipe.planning.overheads import Overheads
from support.layer_costs import layer


def cost_model(machine: Machine, **replaced: float) -> CostModel:
    source = random.Random(3)
    layers = [dataclasses.replace(layer(source, str(at)), **replaced) for at in range(16)]  # type: ignore[arg-type]
    return CostModel({1: layers}, machine, input_bytes=5)


@pytest.mark.parametrize("name", SIMPLEST)
@pytest.mark.parametrize("chunks", [80, 83])
def test_a_long_step_is_extrapolated_rightly(name: str, chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = cost_model(Machine(4, latency=0.01, overheads=Overheads(1.0, 0.02, 0.05, 0.01, 0.02, 0.001)))
    virtual = schedules.fewest_virtual_stages(name)
    candidate = Candidate(name, 4, 1, virtual, 1, chunks, "except_last")
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
    one, two = (Candidate("1f1b", 2, replicas, 1, 1, 8, "never") for replicas in (1, 2))
    alone, together = (costs.estimate(candidate, [8, 8]) for candidate in (one, two))
    parameters = [0, *accumulate(layer.parameter_bytes for layer in costs.layer_costs[1])]
    reduced = [(parameters[b] - parameters[a]) / 100.0 for a, b in ((0, 8), (8, 16))]
    assert min(reduced) - 1e-9 <= together.seconds - alone.seconds <= max(reduced) + 1e-9
    assert alone.memory == together.memory


def test_replicas_share_the_cores() -> None:
    alone, crowded = (
        cost_model(Machine(4, cores=cores)).estimate(Candidate("gpipe", 2, 2, 1, 1, 8, "never"), [8, 8])
        for cores in (4, 2)
    )  # fmt: skip
    assert 1.5 < crowded.seconds / alone.seconds <= 2.0


def test_a_step_has_more_to_it_than_its_timeline() -> None:
    """Two stages, two micro-batches, one second of latency: 2 x 2 x 2 actions, and worker 1 waits for its first."""
    bare = Machine(2, latency=1.0)
    candidate = Candidate("gpipe", 2, 1, 1, 1, 2, "never")
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
    candidate, machine = Candidate("1f1b", 2, replicas, 1, 1, 4, "never"), Machine(2 * replicas, cores=cores)

    def seconds(updates: tuple[float, float]) -> float:
        layers = [
            dataclasses.replace(one, backward=100.0 if at < 8 else 1.0, update=updates[at // 8])
            for at, one in enumerate(cost_model(machine).layer_costs[1])
        ]
        return CostModel({1: layers}, machine, input_bytes=5).estimate(candidate, [8, 8]).seconds

    assert seconds((3.0, 5.0)) - seconds((0.0, 0.0)) == pytest.approx(more)
