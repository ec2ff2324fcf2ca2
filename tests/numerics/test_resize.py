"""A pipeline goes on over other workers with the bits of one that stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rpcpipe as rp
from numerics.test_steps_ahead import model, same
from support.local_cluster import LocalCluster
from support.models import adamw, batches, cross_entropy, mlp, sgd
from support.mortal_cluster import MortalCluster

OTHERS: list[dict[str, Any]] = [{"workers": 4}, {"workers": 1}, {"workers": 3, "balance": [2, 3, 3]}, {}]
OPTIONS: dict[str, dict[str, Any]] = {
    "1f1b": {},
    "interleaved": {"schedule": "interleaved", "virtual_stages": 2},
    "zb-v": {"schedule": "zb-v", "virtual_stages": 2},
    "recompute": {"checkpoint": "always"},
    "float16": {"autocast": torch.float16},
    "clipped": {"clip_grad_norm": 0.1},
    "batched": {"dispatch": "batched"},
}


def train(cluster: Any, resizes: dict[int, dict[str, Any]], **options: Any) -> tuple[list[Any], Any]:
    given: dict[str, Any] = {"loss": cross_entropy, "optimizer": adamw, "chunks": 4} | options
    pipe = rp.Pipeline(given.pop("model", None) or model(8), cluster, **given)
    cluster.deadly = True
    scheduler = torch.optim.lr_scheduler.StepLR(pipe.optimizer, 2, 0.5)
    figures = []
    for number, (x, y) in enumerate(batches(9, 24)):
        if number in resizes:
            pipe.resize(**resizes[number])
            holders = {worker for stage in pipe.stages for worker in stage.workers}
            assert len(holders) == resizes[number].get("workers", len(cluster.workers))
        result = pipe.train_step(x, y)
        figures.append((result.step, result.loss, result.grad_norm, result.lr, pipe.trained, pipe.evaluate([(x, y)])))
        scheduler.step()
    cluster.deadly = False
    return figures, dict(pipe.state_dict())


def plans(name: str) -> dict[int, dict[str, Any]]:
    """When to resize to what: by hand only where a worker has one stage."""
    by_hand = "virtual_stages" not in OPTIONS.get(name, {})
    return dict(zip((2, 4, 6, 7), [one for one in OTHERS if by_hand or "balance" not in one], strict=False))


@pytest.mark.parametrize("name", OPTIONS)
def test_losses_and_weights_are_those_of_a_run_that_is_not_resized(name: str) -> None:
    expected, after = train(LocalCluster(4, 1), {}, **OPTIONS[name])
    figures, state = train(LocalCluster(4, 2), plans(name), **OPTIONS[name])
    assert repr(figures) == repr(expected)
    assert same(state, after)


@pytest.mark.parametrize("seed", range(3))
def test_deaths_meanwhile_change_nothing(seed: int) -> None:
    alive = LocalCluster(4, 1)
    expected, after = train(alive, {}, model=mlp())  # no layer counts the forwards of evaluate
    cluster = MortalCluster(4, seed, rarity=alive.transport.turns // len(expected))
    figures, state = train(cluster, plans(""), model=mlp())
    assert repr(figures) == repr(expected)
    assert same(state, after)
    assert cluster.deaths > 5


def test_replicas_come_and_go() -> None:
    expected, _ = train(LocalCluster(4, 1), {}, optimizer=sgd, model=mlp(dropout=0.0))
    resizes: dict[int, dict[str, Any]] = {2: {"replicas": 2}, 5: {"replicas": 1, "workers": 2}}
    figures, _ = train(LocalCluster(4, 2), resizes, optimizer=sgd, model=mlp(dropout=0.0))
    for one, other in zip(figures, expected, strict=True):
        torch.testing.assert_close(one[1], other[1], rtol=1e-5, atol=1e-6)


def test_sharded_state_goes_along() -> None:
    resizes = {3: {"replicas": 2, "workers": 2}, 6: {"replicas": 2, "workers": 4}}
    options: dict[str, Any] = {"replicas": 2, "shard_optimizer": True}
    expected, after = train(LocalCluster(4, 1), {}, **options)
    figures, state = train(LocalCluster(4, 2), resizes, **options)
    assert repr(figures) == repr(expected)
    assert same(state, after)


def test_a_plan_may_be_given() -> None:
    cluster = LocalCluster(4, 1)
    pipe = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=adamw, chunks=4, balance=[8])
    twin = rp.Pipeline(mlp(), LocalCluster(1), loss=cross_entropy, optimizer=adamw, chunks=4)
    (x, y), second = batches(2, 24)
    plan = rp.plan(mlp(), x, 4, flops=1e9, latency=0.0, bandwidth=1e9, schedules=["gpipe"], chunks=[4])
    pipe.train_step(x, y)
    pipe.resize(plan=plan)
    assert pipe.schedule.name == "gpipe"
    assert len(pipe.balance) == len(plan.balance)
    pipe.train_step(*second)
    twin.train_step(x, y)
    twin.train_step(*second)
    assert same(pipe.state_dict(), twin.state_dict())


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"workers": 5}, rp.PartitionError, "at most the cluster's 4"),
    ({"workers": 3, "replicas": 2}, rp.PartitionError, "multiple of replicas=2"),
    ({"workers": 0}, rp.ArgumentError, "workers"),
    ({"balance": "time"}, rp.ArgumentError, "measures layers here"),
    ({"balance": [4, 3]}, rp.PartitionError, "sum to the model's 8 layers .*sum to 7"),
    ({"balance": [4, 4], "workers": 4}, rp.PartitionError, "must have 4 entries"),
]


@pytest.mark.parametrize(("how", "error", "why"), REFUSED, ids=str)
def test_what_does_not_fit_is_refused_before_anything_moves(
    how: dict[str, Any], error: type[Exception], why: str
) -> None:
    pipe = rp.Pipeline(mlp(), LocalCluster(4), loss=cross_entropy, optimizer=adamw, chunks=4, balance=[4, 4])
    before = pipe.stages
    with pytest.raises(error, match=why):
        pipe.resize(**how)
    assert pipe.stages is before
    x, y = next(batches(1, 24))
    assert pipe.train_step(x, y).applied


def test_a_step_or_an_accumulation_is_not_resized() -> None:
    pipe = rp.Pipeline(mlp(), LocalCluster(2), loss=cross_entropy, optimizer=adamw, chunks=4, accumulate=2)
    x, y = next(batches(1, 24))
    pipe.train_step(x, y)
    with pytest.raises(rp.StateError, match="1 of 2 calls of an accumulation"):
        pipe.resize(1)
    pipe.train_step(x, y)
    with pipe.step() as step:
        step.forward_backward(x, y)
        with pytest.raises(rp.StateError, match="a step is open"):
            pipe.resize(1)
