"""Pipelines in several replicas: the bits of one process; gradients summed, optimizers sharded, buffers alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from support.local_cluster import LocalCluster
from support.models import OPTIMIZERS, adamw, batches, cross_entropy, mlp, sgd, summed
from support.oracle import Oracle
from support.replicas import LOOPED, SYNCHRONOUS, assert_all_replicas_are, make, oracle, states, train_both


@pytest.mark.parametrize("schedule", SYNCHRONOUS)
def test_same_bits_in_any_order_of_messages(schedule: str) -> None:
    """Replicas' bits are those of one process that sums each share's gradients by themselves; by turns sharded."""
    seed = SYNCHRONOUS.index(schedule) % 2
    for workers, replicas in ((1, 2), (2, 2), (3, 2), (2, 3)):
        for virtual in (2, 3)[: 8 // workers - 1] if schedule in LOOPED else (1,):
            seed += 1
            chunks = 2 * workers + seed % 2
            pipe = make(
                LocalCluster(workers * replicas, seed), schedule=schedule, chunks=chunks, virtual_stages=virtual,
                replicas=replicas, shard_optimizer=seed % 2 == 0, dispatch=("rref", "batched")[seed // 2 % 2],
            )  # fmt: skip
            train_both(pipe, oracle(chunks, replicas=replicas), 2, replicas * chunks + seed % 3)


@pytest.mark.parametrize("schedule", SYNCHRONOUS)
def test_same_bits_through_rpc(cluster: rp.Cluster, schedule: str) -> None:
    """K = 2, R = 2; by turns plain and sharded, call by call and batched."""
    at = SYNCHRONOUS.index(schedule)
    pipe = make(
        cluster, schedule=schedule, chunks=4, virtual_stages=2 if schedule in LOOPED else 1,
        shard_optimizer=at % 2 == 0, dispatch=("rref", "batched")[at // 2 % 2],
    )  # fmt: skip
    assert [stage.workers for stage in pipe.stages][:2] == [("worker0", "worker1"), ("worker2", "worker3")]
    train_both(pipe, oracle(4), size=16)
    pipe.close()


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("loss", [cross_entropy, summed])
def test_equals_a_plain_loop_over_all_micro_batches(loss: Any, clip: float | None) -> None:
    """In double precision nearly to the bit: only the order of summation differs. Dropout included."""
    steps: list[tuple[Any, Any]] = [(x.double(), y) for x, y in batches(3, 11)]
    for optimizer in OPTIMIZERS.values():
        pipe = make(LocalCluster(4, 5), mlp().double(), loss=loss, optimizer=optimizer, clip_grad_norm=clip)
        plain = Oracle(mlp().double(), optimizer, loss, 3, replicas=2, plain=True, clip=clip)
        for batch in steps:
            result = pipe.train_step(*batch)
            # Norms, and so what is clipped, are computed in single precision.
            assert result.loss == pytest.approx(plain.train_step(*batch), rel=1e-6 if clip else 1e-12)
            assert result.grad_norm == pytest.approx(plain.grad_norm, rel=1e-6)
        for replica in range(2):
            for have, want in zip(states(pipe, replica), plain.model.state_dict().values(), strict=True):
                torch.testing.assert_close(have, want, rtol=1e-6 if clip else 1e-11, atol=1e-9 if clip else 1e-11)


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize(
    ("size", "counts"), [(1, (1, 0, 0)), (2, (1, 1, 0)), (4, (2, 2, 0)), (7, (2, 2, 1)), (9, (2,) * 3)]
)
def test_batches_of_any_size(size: int, counts: tuple[int, ...], shard: bool) -> None:
    """A replica without a micro-batch takes part in the sums and the update."""
    pipe = make(LocalCluster(6, size), chunks=2, replicas=3, shard_optimizer=shard)
    ours = Oracle(mlp(), adamw, cross_entropy, 2, replicas=3)
    assert pipe.runtime.program.cut(torch.empty(size, 1)).counts == counts
    for batch in batches(3, size):
        assert pipe.train_step(*batch).loss == pytest.approx(ours.train_step(*batch), rel=1e-6)
    assert_all_replicas_are(pipe, ours.model)


def test_two_runs_give_the_same_bits() -> None:
    def run(seed: int) -> list[float]:
        pipe = make(LocalCluster(6, seed), replicas=3)
        return [pipe.train_step(*batch).loss for batch in batches(3, 20)]

    assert run(1) == run(2)


def test_clipping_and_a_loss_of_sum_and_count_through_rpc(cluster: rp.Cluster) -> None:
    for shard in (False, True):
        pipe = make(cluster, loss=summed, clip_grad_norm=0.05, shard_optimizer=shard)
        train_both(pipe, oracle(loss=summed, clip=0.05))
        pipe.close()


@pytest.mark.parametrize("shard", [False, True])
def test_gradients_that_accumulate(shard: bool) -> None:
    """Two calls make one update; the norm so far is that of all replicas."""
    pipe = make(LocalCluster(4, 3), mlp(dropout=0.0).double(), accumulate=2, shard_optimizer=shard, chunks=2)
    whole = make(LocalCluster(4, 4), mlp(dropout=0.0).double(), chunks=2)
    for x, y in batches(3, 16):
        x = x.double()
        first, second = (pipe.train_step(x[part], y[part]) for part in (slice(8), slice(8, 16)))
        once = whole.train_step(x, y)
        assert (first.applied, second.applied) == (False, True)
        assert 0 < first.grad_norm < once.grad_norm * 2
        assert second.grad_norm == pytest.approx(once.grad_norm, rel=1e-6)
    for have, want in zip(states(pipe, 0), states(whole, 0), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-11, atol=1e-11)
    assert all(map(torch.equal, states(pipe, 0), states(pipe, 1)))


@pytest.mark.parametrize("shard", [False, True])
def test_the_loss_scale_of_half_precision(cluster: rp.Cluster, shard: bool) -> None:
    pipe = make(cluster, autocast=torch.float16, shard_optimizer=shard)
    alone = rp.Pipeline(
        mlp(), cluster, loss=cross_entropy, optimizer=adamw, chunks=6, balance=[8], autocast=torch.float16
    )
    for batch in batches(3, 12):
        results = [one.train_step(*batch) for one in (pipe, alone)]
        assert results[0].loss_scale == results[1].loss_scale > 1
        assert results[0].loss == pytest.approx(results[1].loss, rel=1e-3)
        assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-3)
    assert all(map(torch.equal, states(pipe, 0), states(pipe, 1)))
    pipe.close()
    alone.close()


def test_a_frozen_stage_and_frozen_parameters() -> None:
    def model() -> nn.Sequential:
        layers = mlp()
        layers[:4].requires_grad_(False)
        layers[5][0].bias.requires_grad_(False)
        return layers

    for shard in (False, True):
        pipe = make(LocalCluster(4, 2), model(), balance=[4, 4], shard_optimizer=shard)
        reference = model()
        trainable = [p for p in reference.parameters() if p.requires_grad]
        ours = Oracle(reference, lambda _: adamw(trainable), cross_entropy, 3, replicas=2, plain=True)  # noqa: B023
        for batch in batches(3, 12):
            assert pipe.train_step(*batch).loss == pytest.approx(ours.train_step(*batch), rel=1e-5)
        assert all(map(torch.equal, states(pipe, 0), states(pipe, 1)))
        for have, want in zip(states(pipe, 0), reference.state_dict().values(), strict=True):
            torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


def moments(workers: int, shard: bool) -> dict[str, int]:
    """Bytes of optimizer state by worker."""
    cluster = LocalCluster(workers, 1)
    pipe = make(cluster, mlp(9, 64), balance=[4, 5], shard_optimizer=shard)
    pipe.train_step(torch.randn(12, 64), torch.randint(0, 4, (12,)))
    found = {}
    for name, executor in cluster.transport.endpoints.items():
        [actor] = executor.actors.values()
        state = actor.held.optimizer.optimizer.state
        found[name] = sum(v.numel() * v.element_size() for of in state.values() for v in of.values())
    return found


def test_a_sharded_optimizer_holds_its_part_of_the_state() -> None:
    whole, parts = moments(4, shard=False), moments(4, shard=True)
    for name, size in whole.items():
        assert parts[name] == pytest.approx(size / 2, rel=0.1)
    assert sum(parts.values()) * 2 == sum(whole.values())


def test_more_replicas_than_parameters() -> None:
    """Who owns nothing updates nothing and takes over what others did."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    start = [parameter.clone() for parameter in model.parameters()]
    pipes = [make(LocalCluster(6, 1), model, replicas=3, shard_optimizer=shard) for shard in (False, True)]
    for _ in range(2):
        batch = torch.randn(6, 4), torch.randint(0, 4, (6,))
        losses = {pipe.train_step(*batch).loss for pipe in pipes}
        assert len(losses) == 1
    for replica in range(3):
        assert all(map(torch.equal, states(pipes[0], 0), states(pipes[1], replica)))
    assert not any(map(torch.equal, start, states(pipes[1], 2)))


def test_one_replica_may_be_sharded_too() -> None:
    pipe = make(LocalCluster(2, 1), replicas=1, shard_optimizer=True)
    train_both(pipe, oracle(replicas=1))


# --- buffers ---


def normed() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU()),
        nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=None)),
        nn.Linear(8, 4),
    )


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("mode", ["micro_batch", "deferred"])
def test_running_statistics_are_the_same_in_all_replicas(mode: str, shard: bool) -> None:
    """Deferred, they are those of the batch; else what the first replica has seen."""
    chunks = 1 if shard else 2
    pipe = make(
        LocalCluster(6, 4), normed(), replicas=3, chunks=chunks, balance=[1, 2], batch_norm=mode, shard_optimizer=shard
    )
    for batch in batches(3, 21):
        poisoned = batch[0].clone(), batch[1] + 9
        with pytest.raises(rp.StageError):
            pipe.train_step(*poisoned)  # what it did to statistics is taken back
        assert pipe.train_step(*batch).applied
        assert all(map(torch.equal, states(pipe, 0), states(pipe, 1)))
        assert all(map(torch.equal, states(pipe, 0), states(pipe, 2)))
    pipe.train_step(*next(batches(1, 4 if chunks == 1 else 12)))  # of 4 the last replica gets nothing
    assert all(map(torch.equal, states(pipe, 0), states(pipe, 2)))


def test_deferred_statistics_are_those_of_one_replica(cluster: rp.Cluster) -> None:
    # SGD: a bias before a BatchNorm has a gradient of rounding errors, which Adam would make as large as any.
    given: dict[str, Any] = {"optimizer": sgd, "balance": [1, 2], "batch_norm": "deferred"}
    two, one = make(cluster, normed(), chunks=2, **given), make(cluster, normed(), chunks=4, replicas=1, **given)
    for batch in batches(3, 16):
        assert two.train_step(*batch).loss == pytest.approx(one.train_step(*batch).loss, rel=1e-6)
    for have, want in zip(states(two, 1), states(one, 0), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)
    two.close()
    one.close()
