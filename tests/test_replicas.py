"""2D: pipelines in several replicas, equal to one process; gradients summed, optimizers sharded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rpcpipe as rp
from helpers import LocalCluster, Oracle, adamw, batches, cross_entropy, mlp
from rpcpipe import versions

LOOPED = ("interleaved", "looped-bfs")
SYNCHRONOUS = [name for name in rp.schedules.names() if name not in versions.POLICIES]


def states(pipe: rp.Pipeline, replica: int) -> list[torch.Tensor]:
    """All weights of one replica, by way of its workers."""
    driver = pipe._driver
    found = driver.collect({name: driver.post(name, "state_dict") for name in pipe._layout.row(replica)})
    by_stage = {stage: state for stages in found.values() for stage, state in stages.items()}
    return [value for stage in sorted(by_stage) for value in by_stage[stage].values()]


def assert_all_replicas_are(pipe: rp.Pipeline, model: nn.Module) -> None:
    wanted = list(model.state_dict().values())
    for replica in range(pipe._layout.replicas):
        for have, want in zip(states(pipe, replica), wanted, strict=True):
            assert torch.equal(have, want), f"replica {replica} differs by {(have - want).abs().max()}"


def train_both(pipe: rp.Pipeline, oracle: Oracle, steps: int = 3, size: int = 10) -> None:
    for inputs, targets in batches(steps, size):
        result = pipe.train_step(inputs, targets)
        assert result.loss == oracle.train_step(inputs, targets)
        assert result.grad_norm == oracle.grad_norm
    assert_all_replicas_are(pipe, oracle.model)


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("schedule", SYNCHRONOUS)
def test_same_bits_in_any_order_of_messages(schedule: str, shard: bool) -> None:
    """Replicas' bits are those of one process that sums each share's gradients by themselves."""
    seed = 0
    for workers, replicas in ((1, 2), (2, 2), (3, 2), (2, 3)):
        for virtual in (2, 3)[: 8 // workers - 1] if schedule in LOOPED else (1,):
            for chunks in (2 * workers, 2 * workers + 1)[seed % 2 :][:1]:
                seed += 1
                pipe = rp.Pipeline(
                    mlp(), LocalCluster(workers * replicas, seed), loss=cross_entropy, optimizer=adamw,
                    schedule=schedule, chunks=chunks, virtual_stages=virtual, replicas=replicas,
                    shard_optimizer=shard, dispatch=("rref", "batched")[seed % 2],
                )  # type: ignore[arg-type]  # fmt: skip
                size = replicas * chunks + seed % 3
                train_both(pipe, Oracle(mlp(), adamw, cross_entropy, chunks, replicas=replicas), 2, size)
