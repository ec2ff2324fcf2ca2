"""Workers are killed while they train, and training goes on to the same bits."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Sized
from contextlib import contextmanager

import pytest
import torch

import rpcpipe as rp
from support.models import adamw, batches, cross_entropy, mlp
from support.oracle import Oracle, assert_same_weights
from support.replacement import kill


@contextmanager
def killing(cluster: rp.Cluster, seed: int, every: float, results: Sized) -> Iterator[list[float]]:
    """Kill a worker of ``cluster``, any, every so many seconds on average, and at most 3 times between two ``results``.

    On a busy machine all tries of a step would take longer than that.
    """
    source, ended, kills = random.Random(seed), threading.Event(), list[float]()
    seen = [0, 0]  # results, and the kills since there were so many

    def strike() -> None:
        while not ended.wait(source.uniform(0.2, 1.8) * every):
            seen[:] = [len(results), seen[1] + 1 if seen[0] == len(results) else 1]
            if seen[1] > 3:
                continue
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
    with rp.launch(2, threads=1, heal=8) as cluster:
        pipe = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=adamw, chunks=4, dispatch=dispatch)
        oracle = Oracle(mlp(), adamw, cross_entropy, 4)
        data = list(batches(8)) * 12
        losses = [oracle.train_step(*batch) for batch in data]
        found = list[float]()
        with killing(cluster, 1, 0.25, found) as kills:
            for result in pipe.train(data, ahead=ahead):
                found.append(result.loss)
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
