"""Workers are killed while they train, and training goes on to the same bits."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import rpcpipe as rp
from support.models import adamw, batches, cross_entropy, mlp
from support.oracle import Oracle, assert_same_weights
from support.replacement import kill


@contextmanager
def killing(cluster: rp.Cluster, pipe: rp.Pipeline, seed: int, every: float) -> Iterator[list[float]]:
    """Kill a worker of ``cluster``, any, every so many seconds on average, and two at most in one step."""
    source, ended, kills, at_last_result = random.Random(seed), threading.Event(), list[float](), [0]
    pipe.on_step(lambda result: at_last_result.append(len(kills)))

    def strike() -> None:
        while not ended.wait(source.uniform(0.2, 1.8) * every):
            if len(kills) >= at_last_result[-1] + 2:
                continue  # a busy machine restores no worker in the time of some kills, and its tries would run out
            worker = source.choice(cluster.workers)
            try:
                os.kill(worker.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            kills.append(time.monotonic())

    thread = threading.Thread(target=strike, daemon=True)
    thread.start()
    try:
        yield kills
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("dispatch", ["rref", "batched"])
@pytest.mark.timeout(120)
def test_training_goes_on_through_kills(dispatch: str, ahead: int) -> None:
    with rp.launch(2, threads=1, heal=20) as cluster:
        pipe = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=adamw, chunks=4, dispatch=dispatch)
        oracle = Oracle(mlp(), adamw, cross_entropy, 4)
        data = list(batches(8)) * 12
        losses = [oracle.train_step(*batch) for batch in data]
        with killing(cluster, pipe, 1, 0.25) as kills:
            found = [result.loss for result in pipe.train(data, ahead=ahead)]
        assert found == losses
        assert_same_weights(pipe, oracle.model)
        assert len(kills) > 3


def test_a_death_right_after_a_replacement_is_healed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with rp.launch(2, threads=1) as cluster:
        pipe = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=adamw, chunks=4)
        oracle, restore, data = Oracle(mlp(), adamw, cross_entropy, 4), rp.Cluster._restore, list(batches(2))

        def restore_and_kill(own: rp.Cluster) -> None:
            restore(own)
            monkeypatch.setattr(rp.Cluster, "_restore", restore)
            kill(own, 1)

        def kill_and_prepare(targets: torch.Tensor) -> torch.Tensor:
            pipe.runtime.prepare = prepare
            kill(cluster, 0)
            return targets

        prepare, pipe.runtime.prepare = pipe.runtime.prepare, kill_and_prepare  # called within the step
        monkeypatch.setattr(rp.Cluster, "_restore", restore_and_kill)
        for batch in data:
            assert pipe.train_step(*batch).loss == oracle.train_step(*batch)
        assert [event.worker for event in cluster.events if event.kind == "replaced"] == ["worker0", "worker1"]
