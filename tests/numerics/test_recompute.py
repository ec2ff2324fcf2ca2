"""Activation checkpointing: the same bits, less memory, counted."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import rpcpipe as rp
from rpcpipe.stage.activation_memory import Memory, saved_by_graph
from rpcpipe.stage.recompute import Recompute, Run, merge, select
from rpcpipe.worker.actor import Actor
from support.local_cluster import LocalCluster
from support.models import adamw, batches, cross_entropy, mlp, sgd
from support.oracle import Oracle, Versioned, assert_same_weights, train

MODES: list[Any] = ["except_last", "always", 0.5, lambda stage, chunk: (stage + chunk) % 2 == 0]
IDS = ["except_last", "always", "ratio", "callable"]


def pipeline(workers: int, model: nn.Sequential, checkpoint: Any, **changed: Any) -> rp.Pipeline:
    arguments: dict[str, Any] = {"loss": cross_entropy, "optimizer": sgd, "chunks": 4, "balance": "parameters"}
    return rp.Pipeline(model, LocalCluster(workers, 5), checkpoint=checkpoint, **arguments | changed)


@pytest.mark.parametrize("checkpoint", MODES, ids=IDS)
@pytest.mark.parametrize("schedule", rp.schedules.names())
def test_same_bits_as_without(schedule: str, checkpoint: Any) -> None:
    """Dropout on; every synchronous schedule equals the plain loop, the others the serial definition."""
    asynchronous = schedule.startswith("pipedream")
    pipe = pipeline(2, mlp(), checkpoint, schedule=schedule, optimizer=adamw, balance="parameters",
                    virtual_stages=rp.schedules.fewest_virtual_stages(schedule))  # fmt: skip
    data = list(batches(6, 16))
    if asynchronous:
        oracle: Any = Versioned(mlp(), adamw, cross_entropy, pipe.balance)
        expected = train(oracle, data, "2bw" if schedule.endswith("2bw") else "stash", 2, 4)
        assert [result.loss for result in pipe.train(data)] == expected
    else:
        oracle = Oracle(mlp(), adamw, cross_entropy, 4)
        for batch in data:
            result = pipe.train_step(*batch)
            assert result.loss == oracle.train_step(*batch)
            assert result.grad_norm == oracle.grad_norm
    assert_same_weights(pipe, oracle.model)


class InPlace(nn.Module):
    """Changes its input, gives a tuple with a plain value, takes one."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)
        self.first = first

    def forward(self, nest: Any) -> Any:
        x, factor = (nest, 2) if self.first else nest
        x.mul_(factor)
        return (self.linear(x), 3) if self.first else torch.relu_(self.linear(x))


def awkward() -> nn.Sequential:
    torch.manual_seed(2)
    frozen = nn.Linear(12, 12).requires_grad_(False)
    return nn.Sequential(frozen, InPlace(True), InPlace(False), nn.BatchNorm1d(12), nn.Dropout(0.2), nn.Linear(12, 4))


@pytest.mark.parametrize("balance", [[6], [1, 5], [2, 4], [3, 3], [4, 2]], ids=str)
@pytest.mark.parametrize("checkpoint", MODES, ids=IDS)
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_layers_that_are_awkward_to_recompute(schedule: str, checkpoint: Any, balance: list[int]) -> None:
    """In place, tuples, plain values, frozen parameters; BatchNorm's statistics are updated once."""
    pipe = pipeline(len(balance), awkward(), checkpoint, schedule=schedule, balance=balance)
    plain = pipeline(len(balance), awkward(), "never", schedule=schedule, balance=balance)
    for x, y in batches(4, 16):
        assert pipe.train_step(x.clone(), y).loss == plain.train_step(x.clone(), y).loss
    for name, value in plain.state_dict().items():
        assert torch.equal(pipe.state_dict()[name], value), name


def test_recomputations_are_counted_and_save_memory() -> None:
    def step(checkpoint: Any) -> rp.StepResult:
        pipe = pipeline(2, mlp(width=64), checkpoint, schedule="gpipe", balance=[4, 4])
        data = list(batches(2, 64, width=64))
        pipe.train_step(*data[0])
        return pipe.train_step(*data[1])

    never, last, always, some = step("never"), step("except_last"), step("always"), step(0.5)
    assert never.recomputed == (0, 0)
    assert last.recomputed == (16, 0)  # 4 layers × 4 micro-batches
    assert always.recomputed == (16, 16)
    assert last.peak_activation_bytes[1] == never.peak_activation_bytes[1]
    whole, kept = never.peak_activation_bytes[0], 4 * 16 * 64 * 4
    # One micro-batch is recomputed at a time; of the others the input is kept.
    assert always.peak_activation_bytes[0] == whole // 4 + kept * 3 // 4
    assert always.peak_activation_bytes[0] < some.peak_activation_bytes[0] < whole


def test_never_when_nothing_is_trained() -> None:
    pipe = pipeline(2, mlp(), "always")
    x, y = next(batches(1))
    pipe.evaluate([(x, y)])
    pipe(x)
    assert [stage.segments.recomputed for stage in stages_of(pipe)] == [0, 0]


def stages_of(pipe: rp.Pipeline) -> list[Any]:
    workers = pipe.cluster.transport.endpoints.values()  # type: ignore[attr-defined]
    return [stage for worker in workers for actor in worker.actors.values() for stage in actor.held.stages.values()]


@pytest.mark.parametrize("chunks", [8, 16])
def test_1f1b_holds_k_micro_batches_where_gpipe_holds_all(chunks: int) -> None:
    peaks = {
        name: pipeline(4, mlp(), "never", schedule=name, chunks=chunks).train_step(*next(batches(1, 32)))
        for name in ("gpipe", "1f1b")
    }
    for stage in range(4):
        ratio = peaks["1f1b"].peak_activation_bytes[stage] / peaks["gpipe"].peak_activation_bytes[stage]
        assert ratio == pytest.approx((4 - stage) / chunks)


def test_memory_of_a_graph_counts_once_and_no_parameters() -> None:
    linear = nn.Linear(10, 10)
    x = torch.randn(4, 10)
    y = linear(x)  # saves x
    z = torch.sin(x.view(10, 4).requires_grad_())  # a view of the same memory
    assert saved_by_graph([y, z]).without(Memory(linear.parameters())) == 160
    (y.sum() + z.sum()).backward()
    assert linear.weight.grad is not None


@pytest.mark.parametrize("wrong", ["sometimes", 1.5, -0.1, True, None])
def test_other_modes_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="checkpoint must be one of 'never', 'except_last', 'always', a ratio"):
        pipeline(2, mlp(), wrong)


@given(st.lists(st.tuples(st.integers(0, 1000), st.floats(0.001, 1)), min_size=1, max_size=9), st.floats(0.01, 0.99))
def test_a_ratio_is_never_exceeded(costs: list[tuple[int, float]], ratio: float) -> None:
    chosen = select(costs, ratio)
    total = sum(size for size, _ in costs)
    assert sum(size for (size, _), drop in zip(costs, chosen, strict=True) if drop) <= ratio * total
    runs = merge(chosen)
    assert [run.drop for run in runs for _ in range(run.stop - run.start)] == chosen
    assert all(a.stop == b.start and a.drop != b.drop for a, b in itertools.pairwise(runs))


def test_a_ratio_takes_what_saves_most_per_second() -> None:
    assert select([(100, 1.0), (100, 0.1), (50, 0.01), (10, 1.0)], 0.6) == [False, True, True, False]
    recompute = Recompute(0.6, 0, 1, 4)
    assert recompute.runs(0) == [Run(at, at + 1, drop=False) for at in range(4)]
    recompute.learn([(100, 1.0), (100, 0.1), (50, 0.01), (10, 1.0)])
    assert recompute.runs(1) == [Run(0, 1, drop=False), Run(1, 3, drop=True), Run(3, 4, drop=False)]


def test_recomputation_comes_while_waiting_for_the_gradient() -> None:
    """The compute thread has nothing to run: the next action lacks its input. Its chore is to recompute."""
    done: list[tuple[int, bool]] = []

    class Watched(Actor):
        def idle_work(self, action: rp.schedules.Action | None = None) -> bool:
            before = sum(stage.segments.recomputed for stage in self.held.stages.values())
            busy = super().idle_work(action)
            if action is not None and sum(stage.segments.recomputed for stage in self.held.stages.values()) > before:
                done.append((action.stage, action.kind == "B"))
            return busy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rpcpipe.worker.executor.Actor", Watched)
        pipe = pipeline(2, mlp(), "except_last", schedule="gpipe", balance=[4, 4])
        cluster: Any = pipe.cluster
        first = cluster.transport.endpoints["worker0"]
        run_one = first.run_one

        def with_chores() -> bool:
            if run_one():
                return True
            for name, box in first._mailboxes.items():
                if (action := box.awaited()) is not None:
                    first.actors[name].idle_work(action)
            return False

        first.run_one = with_chores
        oracle = Oracle(mlp(), sgd, cross_entropy, 4)
        for batch in batches(3):
            assert pipe.train_step(*batch).loss == oracle.train_step(*batch)
    assert len(done) >= 3
    assert set(done) == {(0, True)}
    assert_same_weights(pipe, oracle.model)


def test_through_rpc_with_the_same_bits(cluster: rp.Cluster) -> None:
    pipe = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=adamw, chunks=8, checkpoint="always")
    oracle = Oracle(mlp(), adamw, cross_entropy, 8)
    for batch in batches(5, 16):
        assert pipe.train_step(*batch).loss == oracle.train_step(*batch)
    assert_same_weights(pipe, oracle.model)
    pipe.close()
