"""The live view of workers that are processes."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.request
from typing import Any

import rpcpipe as rp
from support.models import batches, cross_entropy, mlp, sgd

SECONDS = 20.0


def state(view: Any) -> dict[str, Any]:
    with urllib.request.urlopen(view.url.replace("/?", "/state?"), timeout=SECONDS) as reply:
        return dict(json.load(reply))


def test_a_death_and_a_replacement_are_shown() -> None:
    first, second = batches(2)
    with rp.launch(workers=2, threads=1, timeout=20.0, heal=True) as cluster:
        pipe = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=sgd, chunks=2)
        with rp.view(pipe) as view:
            pipe.train_step(*first)
            before = state(view)
            died = cluster.workers[1]
            os.kill(died.pid, signal.SIGKILL)
            result = pipe.train_step(*second)
            after = state(view)
        places = [f"{worker.host}:{worker.pid}" for worker in cluster.workers]
    assert [one["stages"] for one in before["workers"]] == [[0], [1]]
    assert before["workers"][1]["place"] == f"{died.host}:{died.pid}"
    assert [one["place"] for one in after["workers"]] == places
    assert after["workers"][1]["place"] != before["workers"][1]["place"]
    assert [one["kind"] for one in after["events"]] == ["died", "replaced"]
    assert str(died.pid) in after["events"][0]["what"]
    assert after["figures"]["loss"] == result.loss


def test_signs_of_life_are_told(trio: rp.Cluster) -> None:
    until = time.monotonic() + SECONDS
    while any(status.heard is None for status in trio.status()) and time.monotonic() < until:
        trio.call(1, os.getpid)
    for status in trio.status():
        assert status.heard is not None
        assert status.memory > 2**20
        assert not status.lost
        assert status.stages == ()
