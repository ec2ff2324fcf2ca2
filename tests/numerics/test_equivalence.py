"""The numerics contract: the same bits as a plain single-process loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.schedules import weight_versions
from support.local_cluster import LocalCluster
from support.models import OPTIMIZERS, adamw, batches, cross_entropy, mlp, sgd, summed
from support.oracle import Oracle, assert_same_weights
from support.seeds import some

SIZES = {1: [8], 2: [3, 5], 3: [3, 2, 3], 4: [2, 2, 2, 2]}


def train_both(pipe: rp.Pipeline, oracle: Oracle, steps: int = 5, size: int = 10) -> None:
    for inputs, targets in batches(steps, size):
        result = pipe.train_step(inputs, targets)
        assert result.loss == oracle.train_step(inputs, targets)
        assert result.grad_norm == oracle.grad_norm
    assert_same_weights(pipe, oracle.model)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("schedule", ["naive", "gpipe", "1f1b"])
def test_same_bits_through_rpc(cluster: rp.Cluster, schedule: str, optimizer: str) -> None:
    """Both dispatch modes by turns."""
    make: Any = OPTIMIZERS[optimizer]
    for stages, balance in SIZES.items():
        for at, chunks in enumerate((1, 3, 8)):
            dispatch = ("rref", "batched")[(stages + at) % 2]
            pipe = rp.Pipeline(
                mlp(), cluster, loss=cross_entropy, optimizer=make, schedule=schedule, chunks=chunks,
                balance=balance, dispatch=dispatch,
            )  # fmt: skip
            train_both(pipe, Oracle(mlp(), make, cross_entropy, chunks), steps=3)
            assert len(pipe.stages) == stages
            pipe.close()


@pytest.mark.parametrize("schedule", ["eager-1f1b", "interleaved", "looped-bfs", "zb-h1", "zb-v", "dualpipe-v"])
def test_same_bits_of_the_other_schedules_through_rpc(cluster: rp.Cluster, schedule: str) -> None:
    virtual = 2 if schedule in LOOPED else 1
    pipe = rp.Pipeline(
        mlp(), cluster, loss=cross_entropy, optimizer=adamw, schedule=schedule, chunks=8, virtual_stages=virtual
    )
    train_both(pipe, Oracle(mlp(), adamw, cross_entropy, 8), size=16)
    pipe.close()


LOOPED = ("interleaved", "looped-bfs")


@pytest.mark.parametrize("schedule", [name for name in rp.schedules.names() if name not in weight_versions.POLICIES])
def test_same_bits_in_any_order_of_messages(schedule: str) -> None:
    """K × v ≤ 8 stages, M from 1 to 3K, every message shuffled, both dispatch modes by turns; a part of these."""
    shapes = [
        (workers, virtual, chunks)
        for workers in (1, 2, 3, 4)
        for virtual in (range(2, 8 // workers + 1) if schedule in LOOPED else (1,))
        for chunks in range(2 * workers if schedule == "dualpipe-v" else 1, 3 * workers + 1)
    ]
    for seed, (workers, virtual, chunks) in some(enumerate(shapes, 1), 8):
        pipe = rp.Pipeline(
            mlp(), LocalCluster(workers, seed), loss=cross_entropy, optimizer=sgd, schedule=schedule,
            chunks=chunks, virtual_stages=virtual, dispatch=("rref", "batched")[seed % 2],
        )  # fmt: skip
        train_both(pipe, Oracle(mlp(), sgd, cross_entropy, chunks), steps=2, size=chunks + chunks // 2)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_loss_of_sum_and_count_is_normalised_over_the_batch(cluster: rp.Cluster, clip: float | None) -> None:
    oracle = Oracle(mlp(), adamw, summed, 3, clip=clip)
    pipe = rp.Pipeline(mlp(), cluster, loss=summed, optimizer=adamw, chunks=3, clip_grad_norm=clip)
    train_both(pipe, oracle, steps=4)
    pipe.close()


def test_clipping_equals_torchs_to_the_bit(cluster: rp.Cluster) -> None:
    pipe = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=sgd, chunks=3, clip_grad_norm=0.05)
    train_both(pipe, Oracle(mlp(), sgd, cross_entropy, 3, clip=0.05))
    pipe.close()


def test_learning_rate_schedulers_work_unchanged(cluster: rp.Cluster) -> None:
    oracle = Oracle(mlp(), sgd, cross_entropy, 2)
    pipe = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=sgd, chunks=2)
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=8)
        for optimizer in (pipe.optimizer, oracle.optimizer)
    ]
    for inputs, targets in batches(6):
        pipe.train_step(inputs, targets)
        oracle.train_step(inputs, targets)
        for scheduler in schedulers:
            scheduler.step()
    pipe.optimizer.param_groups[0]["lr"] = oracle.optimizer.param_groups[0]["lr"] = 0.01
    train_both_once = next(batches(1))
    pipe.train_step(*train_both_once)
    oracle.train_step(*train_both_once)
    assert_same_weights(pipe, oracle.model)
    pipe.close()


def test_two_runs_give_the_same_bits_and_another_seed_does_not(cluster: rp.Cluster) -> None:
    def losses(seed: int) -> list[float]:
        pipe = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=sgd, chunks=4, seed=seed)
        found = [pipe.train_step(*batch).loss for batch in batches(2)]
        pipe.close()
        return found

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


@pytest.mark.parametrize("kind", ["local", "rpc"])
def test_the_schedule_changes_in_a_live_run_and_the_bits_stay(kind: str, request: pytest.FixtureRequest) -> None:
    """Same stages, other placements and other cuts; Adam's moments and the learning rate move along."""
    where: Any = LocalCluster(4, 3) if kind == "local" else request.getfixturevalue("cluster")
    pipe = rp.Pipeline(mlp(), where, loss=cross_entropy, optimizer=adamw, chunks=8)
    oracle = Oracle(mlp(), adamw, cross_entropy, 8)
    names = ["gpipe", "zb-v", "interleaved", "zb-h1", "dualpipe-v", "looped-bfs", "naive", "1f1b"]
    for batch, name in zip(batches(len(names), 16), names, strict=True):
        assert pipe.train_step(*batch).loss == oracle.train_step(*batch)
        pipe.schedule = name
        for optimizer in (pipe.optimizer, oracle.optimizer):
            optimizer.param_groups[0]["lr"] *= 0.9
    custom = rp.Schedule.from_csv(rp.schedules.get("eager-1f1b", 4, 4).to_csv())
    pipe.schedule = custom
    oracle.chunks = 4
    batch = next(batches(1, 16))
    assert pipe.train_step(*batch).loss == oracle.train_step(*batch)
    assert_same_weights(pipe, oracle.model)
    with pytest.raises(rp.ArgumentError, match="unknown schedule"):
        pipe.schedule = "zigzag"
    assert pipe.train_step(*batch).loss == oracle.train_step(*batch)
    pipe.close()


def test_neither_failed_steps_nor_evaluations_change_what_dropout_draws(cluster: rp.Cluster) -> None:
    pipe = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=sgd, chunks=3)
    oracle = Oracle(mlp(), sgd, cross_entropy, 3)
    for inputs, targets in batches(3):
        pipe.evaluate([(inputs, targets)])
        with pytest.raises(rp.StageError):
            pipe.train_step(inputs, targets + 100)
        result = pipe.train_step(inputs, targets)
        assert result.step == oracle.step
        assert result.loss == oracle.train_step(inputs, targets)
    assert pipe.trained == 3
    assert_same_weights(pipe, oracle.model)
    pipe.close()


def test_moving_after_an_evaluation_trains_on_in_training_mode(cluster: rp.Cluster) -> None:
    pipe = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=adamw, chunks=8)
    oracle = Oracle(mlp(), adamw, cross_entropy, 8)
    for batch, name in zip(batches(4, 16), ["interleaved", "1f1b", "zb-v", "gpipe"], strict=True):
        assert pipe.train_step(*batch).loss == oracle.train_step(*batch)
        pipe.evaluate([batch])
        pipe.schedule = name
    assert pipe.train_step(*batch).loss == oracle.train_step(*batch)
    assert_same_weights(pipe, oracle.model)
    pipe.close()


def test_a_refused_schedule_leaves_the_pipeline_as_it_was(cluster: rp.Cluster) -> None:
    pipe = rp.Pipeline(mlp(4), cluster, loss=cross_entropy, optimizer=sgd, chunks=4)
    oracle = Oracle(mlp(4), sgd, cross_entropy, 4)
    with pytest.raises(rp.PartitionError, match="cannot cut 4 layers into 8 stages"):
        pipe.schedule = "zb-v"
    assert pipe.schedule.name == "1f1b"
    batch = next(batches(1))
    assert pipe.train_step(*batch).loss == oracle.train_step(*batch)
    pipe.close()


def nothing_counted(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    kept = target > 9
    return nn.functional.cross_entropy(output[kept], target[kept], reduction="sum"), kept.sum()


def test_a_batch_in_which_nothing_counts_changes_nothing(cluster: rp.Cluster) -> None:
    pipe = rp.Pipeline(mlp(), cluster, loss=nothing_counted, optimizer=sgd, chunks=2)
    before = pipe.state_dict()
    assert not pipe.train_step(*next(batches(1))).applied
    assert all(torch.equal(before[name], value) for name, value in pipe.state_dict().items())
    with pytest.raises(ValueError, match="something counts"):
        pipe.evaluate(batches(1))
    pipe.close()
