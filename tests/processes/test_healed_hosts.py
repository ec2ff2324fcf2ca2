"""Agents of ranks die with all that their workers held, and training goes on with the same bits."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch

import rpcpipe as rp
from numerics.test_steps_ahead import model, pipeline, same
from support.local_cluster import LocalCluster
from support.models import batches
from support.ranks import Ranks, ranks

DATA = list(batches(12, 24))


def trained(pipe: rp.Pipeline, among: Ranks | None = None, deaths: dict[int, str] | None = None) -> list[float]:
    scheduler, losses = torch.optim.lr_scheduler.StepLR(pipe.optimizer, 2, 0.5), []
    for number, batch in enumerate(DATA):
        if among is not None and deaths is not None and number in deaths:
            while not pipe.runtime.history.safe:  # its last snapshot may be on its way
                pipe.runtime.history.tick()
                pipe.evaluate([batch])
            domain = pipe.cluster.hosts()[deaths[number]]
            among.kill(pipe.cluster, int(domain.partition("#")[2]))
        losses.append(pipe.train_step(*batch).loss)
        scheduler.step()
    return losses


def test_training_goes_on_over_a_spare_rank_then_over_fewer_workers(caplog: pytest.LogCaptureFixture) -> None:
    alone = pipeline(LocalCluster(2), model=model())
    expected = trained(alone)
    with ranks(4) as group, closing(group), group.connect(spares=1, heal="shrink") as cluster:
        pipe = pipeline(cluster, model=model())
        assert trained(pipe, group, {4: "worker1", 8: "worker0"}) == expected
        assert same(pipe.state_dict(), alone.state_dict())
        kinds = ["died", "spare used", "died", "stands in", "removed"]
        assert [event.kind for event in cluster.events] == kinds
        assert ([worker.name for worker in cluster.workers], cluster.stand_ins) == (["worker1"], ())
        assert caplog.text.count("went back to the newest snapshot") == 2
