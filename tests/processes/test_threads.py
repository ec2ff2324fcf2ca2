"""Threads call one pipeline of real workers at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

import rpcpipe as rp
from support.misuse import at_once
from support.models import batches, cross_entropy, mlp, sgd

[BATCH] = batches(1)


@pytest.mark.parametrize("options", [{}, {"dispatch": "batched"}, {"schedule": "pipedream"}], ids=str)
def test_calls_of_several_threads_take_turns(cluster: rp.Cluster, options: dict[str, str]) -> None:
    pipe, fresh = (rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=sgd, **options) for _ in range(2))
    with ThreadPoolExecutor(6) as threads:
        losses = at_once(threads, pipe, BATCH, 60.0)
    assert set(losses) == {fresh.train_step(*BATCH).loss for _ in range(4)}
    assert pipe.train_step(*BATCH).loss == fresh.train_step(*BATCH).loss
    pipe.close()
    fresh.close()
