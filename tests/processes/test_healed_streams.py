"""Workers are killed in a stream and while a schedule is changed, and training goes on to the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import rpcpipe as rp
from processes.test_healing import killing
from support.local_cluster import LocalCluster
from support.models import adamw, batches, cross_entropy, mlp
from support.oracle import Oracle, assert_same_weights
from support.stream import pipeline

MINIBATCHES = 300


@pytest.mark.parametrize("policy", ["stash", "vertical_sync", "latest", "2bw"])
@pytest.mark.timeout(120)
def test_a_stream_goes_on_through_kills(policy: str) -> None:
    """A snapshot is due every 32 minibatches, so most of what is replayed begins with one."""
    count = MINIBATCHES // (4 if policy == "2bw" else 1)
    expected = pipeline(2, policy, LocalCluster(2, 1), optimizer=adamw)
    wanted = [(result.step, result.loss, result.grad_norm) for result in expected.train(batches(count))]
    with rp.launch(2, threads=1) as cluster:
        pipe = pipeline(2, policy, cluster, optimizer=adamw)
        found, told = list[Any](), list[int]()
        pipe.on_step(lambda result: told.append(result.step))
        with killing(cluster, 1, 0.3) as kills:
            for result in pipe.train(batches(count)):
                found.append((result.step, result.loss, result.grad_norm))
        assert found == wanted
        assert told == [step for step, _, _ in wanted]
        state = expected.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in pipe.state_dict().items())
        assert len(kills) > 1


@pytest.mark.timeout(120)
def test_a_schedule_is_changed_through_kills() -> None:
    names = ["interleaved", "1f1b", "zb-v", "gpipe"] * 6
    with rp.launch(2, threads=1) as cluster:
        pipe = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=adamw, chunks=4)
        oracle = Oracle(mlp(), adamw, cross_entropy, 4)
        with killing(cluster, 2, 0.15) as kills:
            for name, (inputs, targets) in zip(names, _again(batches(4)), strict=False):
                pipe.schedule = name
                assert pipe.train_step(inputs, targets).loss == oracle.train_step(inputs, targets)
                assert pipe.schedule.name == name
        assert_same_weights(pipe, oracle.model)
        assert len(kills) > 3


def _again(data: Iterator[Any]) -> Iterator[Any]:
    kept = list(data)
    while True:
        yield from kept
