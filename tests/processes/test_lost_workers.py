"""A worker that dies is named with its stage and replica, also while a stream is open."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

import rpcpipe as rp
from support.models import batches
from support.replicas import make
from support.stream import pipeline


def test_a_dead_worker_is_named_with_its_stage_and_replica() -> None:
    with rp.launch(workers=4, threads=1, heal=False) as cluster:
        pipe = make(cluster)
        pipe.train_step(*next(batches(1)))
        os.kill(cluster.workers[3].pid, signal.SIGKILL)
        with pytest.raises(rp.WorkerLost, match=r"^stage 1 of replica 1 on worker3") as caught:  # noqa: PT012
            for batch in batches(1000):
                pipe.train_step(*batch)
        assert caught.value.stages == (1,)


def test_a_worker_that_dies_in_mid_stream_is_named() -> None:
    with rp.launch(workers=2, heal=False) as cluster:
        pipe = pipeline(2, "stash", cluster)

        def killing() -> Iterator[Any]:
            for number, batch in enumerate(batches(200)):
                if number == 20:
                    os.kill(cluster.workers[1].pid, signal.SIGKILL)
                yield batch

        with pytest.raises(rp.WorkerLost, match=r"worker1 .*SIGKILL"):
            list(pipe.train(killing()))
