"""A failure in one replica: the step is cancelled or taken back in all of them."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.stage.optimizer import LocalOptimizer
from support.local_cluster import LocalCluster
from support.models import batches, mlp
from support.replicas import assert_all_replicas_are, make, oracle
from support.seeds import some


def fail_on_nan(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    if inputs[0].isnan().any():
        raise ArithmeticError("NaN in the input")


def failing() -> nn.Sequential:
    layers = mlp()
    layers[5].register_forward_pre_hook(fail_on_nan)
    return layers


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("seed", some(range(15), 4))
def test_an_error_in_one_replica_cancels_the_step_in_all(seed: int, shard: bool) -> None:
    pipe = make(LocalCluster(4, seed), failing(), shard_optimizer=shard)
    ours = oracle()
    for batch in batches(3):
        poisoned = batch[0].clone()
        poisoned[5 + 4 * (seed % 2)] = float("nan")  # replica 1's first or last micro-batch
        with pytest.raises(rp.StageError, match="NaN in the input") as caught:
            pipe.train_step(poisoned, batch[1])
        assert (caught.value.stage, caught.value.chunk) == (1, 3 + 2 * (seed % 2))
        assert caught.value.failure.worker == "worker3"
        assert pipe.train_step(*batch).loss == ours.train_step(*batch)
    assert_all_replicas_are(pipe, ours.model)


def test_an_error_in_one_replica_through_rpc(cluster: rp.Cluster) -> None:
    pipe, ours = make(cluster, failing()), oracle()
    for batch in batches(2):
        poisoned = batch[0].clone()
        poisoned[6] = float("nan")
        with pytest.raises(rp.StageError, match="micro-batch 3 on worker3 raised ArithmeticError: NaN in the input"):
            pipe.train_step(poisoned, batch[1])
        assert pipe.train_step(*batch).loss == ours.train_step(*batch)
    assert_all_replicas_are(pipe, ours.model)
    pipe.close()


class RaisingAdamW(torch.optim.AdamW):
    """Applies its update and then raises, in the third step, on one worker."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, lr=1e-2)
        self.calls = 0

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        self.calls += 1
        super().step()
        if self.calls == 3 and os.environ.get("RPCPIPE_VICTIM"):
            raise RuntimeError("boom in optimizer")


def be_the_victim() -> None:
    os.environ["RPCPIPE_VICTIM"] = "1"


def be_no_victim() -> None:
    os.environ.pop("RPCPIPE_VICTIM", None)


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("victim", ["worker1", "worker2"])
def test_an_optimizer_that_raises_on_one_replica_is_taken_back_on_all(
    cluster: rp.Cluster, victim: str, shard: bool
) -> None:
    pipe, ours = make(cluster, optimizer=RaisingAdamW, shard_optimizer=shard), oracle()
    cluster.call(victim, be_the_victim)
    data = list(batches(5))
    for batch in data[:2]:
        pipe.train_step(*batch)
        ours.train_step(*batch)
    with pytest.raises(rp.StageError, match="boom in optimizer") as caught:
        pipe.train_step(*data[2])
    assert caught.value.failure.worker == victim
    cluster.call(victim, be_no_victim)
    assert_all_replicas_are(pipe, ours.model)
    for batch in data[3:]:
        pipe.train_step(*batch)
        ours.train_step(*batch)
    assert_all_replicas_are(pipe, ours.model)  # Adam's moments and step counts were taken back too
    pipe.close()


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("seed", some(range(10), 4))
def test_sharded_or_not_an_optimizer_that_raises_changes_nothing(
    seed: int, shard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any order of messages: others' new weights may be in, on their way, or not yet made."""
    apply, victims = LocalOptimizer.apply, list[int]()

    def counted(self: LocalOptimizer, *args: Any) -> None:
        apply(self, *args)
        victims.append(0)
        if len(victims) == 4 * 2 + 1 + seed % 4:
            raise RuntimeError("boom in optimizer")

    monkeypatch.setattr(LocalOptimizer, "apply", counted)
    pipe, ours = make(LocalCluster(4, seed), shard_optimizer=shard), oracle()
    data = list(batches(4))
    for batch in data[:2]:
        pipe.train_step(*batch)
        ours.train_step(*batch)
    with pytest.raises(rp.StageError, match="boom in optimizer"):
        pipe.train_step(*data[2])
    assert_all_replicas_are(pipe, ours.model)
    pipe.train_step(*data[3])
    ours.train_step(*data[3])
    assert_all_replicas_are(pipe, ours.model)


@pytest.mark.parametrize("shard", [False, True])
def test_a_step_is_taken_back_on_all_replicas(cluster: rp.Cluster, shard: bool) -> None:
    pipe, ours = make(cluster, shard_optimizer=shard), oracle()
    first, second = batches(2)
    pipe.train_step(*first)
    ours.train_step(*first)
    with pytest.raises(KeyboardInterrupt), pipe.step() as step:  # noqa: PT012
        step.forward_backward(*second)
        step.optimize()
        raise KeyboardInterrupt
    assert_all_replicas_are(pipe, ours.model)
    assert pipe.train_step(*second).loss == ours.train_step(*second)
    assert_all_replicas_are(pipe, ours.model)
    pipe.close()


def test_lost_gradients_run_into_the_deadline_which_names_them() -> None:
    def drop(to: str, verb: str) -> bool:
        return verb.startswith("deliver") and to == "worker1" and bool(dropping)

    dropping = [True]
    pipe = make(LocalCluster(2, drop=drop, timeout=0.2), chunks=2)
    batch = next(batches(1))
    with pytest.raises(rp.DeadlineExceeded, match=r"worker1 waits for the gradients from worker0 of bucket . of stage"):
        pipe.train_step(*batch)
    dropping.clear()
    ours = oracle(2)
    assert pipe.train_step(*batch).loss == ours.train_step(*batch)
    assert_all_replicas_are(pipe, ours.model)
