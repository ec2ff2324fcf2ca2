"""A pipeline whose workers' successors take over, over the shuffling transport."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rpcpipe as rp
from rpcpipe.cluster.kept_descriptor import KeptDescriptor
from rpcpipe.worker.executor import Executor
from support.local_cluster import LocalCluster
from support.models import adamw, batches, cross_entropy, mlp
from support.oracle import Natural, assert_same_weights


def replace(pipe: rp.Pipeline, cluster: LocalCluster, name: str) -> None:
    """Let another executor go on as worker ``name``, as a driver would have it."""
    driver: Any = pipe.runtime.driver
    old = cluster.transport.endpoints[name]
    [actor] = old.actors.values()
    kept_at = actor.describe()[next(iter(actor.held.stages))].kept_at
    keeper = KeptDescriptor(*kept_at)
    new = Executor(name, cluster.transport, device=torch.device("cpu"), threads=1)
    cluster.transport.serve(name, new)
    infos = driver.collect({name: driver.revive(name, keeper.path)})[name]
    keeper.close()
    assert {stage: info.layers for stage, info in infos.items()} == {
        stage: info.layers for stage, info in actor.describe().items()
    }
    driver._sender._numbers.clear()  # the successor has none of the programs


@pytest.mark.parametrize("options", [{}, {"checkpoint": "always", "schedule": "zb-h1"}, {"dispatch": "batched"}])
def test_successors_train_on_with_the_bits_of_a_plain_loop(options: dict[str, Any]) -> None:
    cluster = LocalCluster(2, 1, heal=1)
    pipe = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=adamw, chunks=4, **options)
    loop = Natural(mlp(), adamw, cross_entropy, 4)
    for number, (inputs, targets) in enumerate(batches(6)):
        assert pipe.train_step(inputs, targets).loss == loop.train_step(inputs, targets)
        replace(pipe, cluster, f"worker{number % 2}")
    assert_same_weights(pipe, loop.model)


def test_successors_in_sharded_replicas() -> None:
    cluster = LocalCluster(4, 1, heal=1)
    pipe = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=adamw, chunks=2, replicas=2, shard_optimizer=True)
    straight = rp.Pipeline(
        mlp(), LocalCluster(4, 2), loss=cross_entropy, optimizer=adamw, chunks=2, replicas=2, shard_optimizer=True
    )
    for number, (inputs, targets) in enumerate(batches(6)):
        assert pipe.train_step(inputs, targets).loss == straight.train_step(inputs, targets).loss
        replace(pipe, cluster, f"worker{number % 4}")
    for name, value in straight.state_dict().items():
        assert torch.equal(pipe.state_dict()[name], value)
