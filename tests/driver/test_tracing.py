"""Measured timelines over the transport that shuffles every message."""

from __future__ import annotations

import rpcpipe as rp
from support.local_cluster import LocalCluster
from support.models import batches, cross_entropy, mlp, sgd


def test_tracing_over_the_shuffling_transport() -> None:
    pipe = rp.Pipeline(mlp(), LocalCluster(3, 5), loss=cross_entropy, optimizer=sgd, chunks=4)
    with pipe.trace() as timeline:
        pipe.train_step(*next(batches(1)))
    assert len(timeline.spans) == 2 * 4 * 3 + 3
    assert len(timeline.transfers) == 2 * 4 * 2
