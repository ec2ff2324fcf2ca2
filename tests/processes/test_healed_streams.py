"""Workers are killed in a stream and while a schedule is changed, and training goes on to the same bits."""

from __future__ import annotations

import os
import random
import signal
import threading
from typing import Any

import pytest
import torch

import rpcpipe as rp
from support.local_cluster import LocalCluster
from support.models import adamw, batches, cross_entropy, mlp
from support.oracle import Oracle, assert_same_weights
from support.stream import pipeline

MINIBATCHES = 150


class Strikes:
    """Kills workers of ``cluster`` by SIGKILL, any, at moments of other threads' choice."""

    def __init__(self, cluster: rp.Cluster) -> None:
        self.hits = 0
        self._cluster, self._random, self._timers = cluster, random.Random(1), list[threading.Timer]()

    def soon(self) -> None:
        """Kill one within some milliseconds, and one perhaps while its loss is being healed."""
        for latest in (0.02, 0.2):
            self._timers.append(threading.Timer(self._random.uniform(0, latest), self._strike))
            self._timers[-1].start()

    def _strike(self) -> None:
        try:
            os.kill(self._random.choice(self._cluster.workers).pid, signal.SIGKILL)
            self.hits += 1
        except ProcessLookupError:
            pass  # it is dead already

    def join(self) -> None:
        """Wait until no kill is due."""
        for timer in self._timers:
            timer.join()


@pytest.mark.parametrize("policy", ["stash", "latest", "2bw"])
@pytest.mark.timeout(120)
def test_a_stream_goes_on_through_kills(policy: str) -> None:
    """A snapshot is due every 32 minibatches, so most of what is replayed begins with one."""
    count = MINIBATCHES // (4 if policy == "2bw" else 1)
    expected = pipeline(2, policy, LocalCluster(2, 1), optimizer=adamw)
    wanted = [(result.step, result.loss, result.grad_norm) for result in expected.train(batches(count))]
    with rp.launch(2, threads=1, heal=20) as cluster:
        pipe = pipeline(2, policy, cluster, optimizer=adamw)
        found, told = list[Any](), list[int]()
        pipe.on_step(lambda result: told.append(result.step))
        strikes = Strikes(cluster)
        for result in pipe.train(batches(count)):
            found.append((result.step, result.loss, result.grad_norm))
            if len(found) % (count // 4) == 5:
                strikes.soon()
        strikes.join()
        assert found == wanted
        assert told == [step for step, _, _ in wanted]
        state = expected.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in pipe.state_dict().items())
        assert strikes.hits > 3


@pytest.mark.timeout(120)
def test_a_schedule_is_changed_through_kills() -> None:
    names = ["interleaved", "1f1b", "zb-v", "gpipe"] * 3
    with rp.launch(2, threads=1, heal=20) as cluster:
        pipe = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=adamw, chunks=4)
        oracle = Oracle(mlp(), adamw, cross_entropy, 4)
        strikes = Strikes(cluster)
        for name, (inputs, targets) in zip(names, batches(len(names)), strict=True):
            strikes.soon()
            pipe.schedule = name
            assert pipe.train_step(inputs, targets).loss == oracle.train_step(inputs, targets)
            assert pipe.schedule.name == name
        strikes.join()
        assert_same_weights(pipe, oracle.model)
        assert strikes.hits > 6
