"""Pipelines in several replicas, beside one process."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.schedules import weight_versions
from rpcpipe.worker.operations import GetState
from support.models import adamw, batches, cross_entropy, mlp
from support.oracle import Oracle

LOOPED = ("interleaved", "looped-bfs")


SYNCHRONOUS = [name for name in rp.schedules.names() if name not in weight_versions.POLICIES]


def make(cluster: Any, model: nn.Module | None = None, **arguments: Any) -> rp.Pipeline:
    given: dict[str, Any] = {"loss": cross_entropy, "optimizer": adamw, "chunks": 3, "replicas": 2, **arguments}
    return rp.Pipeline(model or mlp(), cluster, **given)


def states(pipe: rp.Pipeline, replica: int) -> list[torch.Tensor]:
    """All weights of one replica, by way of its workers."""
    driver = pipe.runtime.driver
    found = driver.collect({name: driver.call(name, GetState()) for name in pipe.runtime.layout.pipeline_of(replica)})
    by_stage = {stage: state for stages in found.values() for stage, state in stages.items()}
    return [value for stage in sorted(by_stage) for value in by_stage[stage].values()]


def assert_all_replicas_are(pipe: rp.Pipeline, model: nn.Module) -> None:
    wanted = list(model.state_dict().values())
    for replica in range(pipe.runtime.layout.replicas):
        for have, want in zip(states(pipe, replica), wanted, strict=True):
            assert torch.equal(have, want), f"replica {replica} differs by {(have - want).abs().max()}"


def train_both(pipe: rp.Pipeline, oracle: Oracle, steps: int = 3, size: int = 10) -> None:
    for inputs, targets in batches(steps, size):
        result = pipe.train_step(inputs, targets)
        assert result.loss == oracle.train_step(inputs, targets)
        assert result.grad_norm == oracle.grad_norm
    assert_all_replicas_are(pipe, oracle.model)


def oracle(chunks: int = 3, optimizer: Any = adamw, loss: Any = cross_entropy, **more: Any) -> Oracle:
    return Oracle(mlp(), optimizer, loss, chunks, **{"replicas": 2, **more})
