"""Agents of ranks die with all that their workers held, and training goes on with the same bits."""

from __future__ import annotations

from collections import Counter
from contextlib import closing, suppress

import pytest
import torch

import rpcpipe as rp
from numerics.test_steps_ahead import model, pipeline, same
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


@pytest.fixture(scope="module")
def undisturbed() -> tuple[list[float], dict[str, torch.Tensor]]:
    with rp.launch(workers=2, threads=1) as cluster:
        pipe = pipeline(cluster, model=model())
        return trained(pipe), dict(pipe.state_dict())


def test_spare_ranks_take_the_places_of_ranks_that_die(
    undisturbed: tuple[list[float], dict[str, torch.Tensor]], caplog: pytest.LogCaptureFixture
) -> None:
    with ranks(5) as group, closing(group), group.connect(spares=2) as cluster:
        pipe = pipeline(cluster, model=model())
        assert trained(pipe, group, {4: "worker1", 8: "worker0"}) == undisturbed[0]
        assert same(pipe.state_dict(), undisturbed[1])
        assert [event.kind for event in cluster.events] == ["died", "spare used"] * 2
        assert len(cluster.workers) == 2
        assert caplog.text.count("went back to the newest snapshot") == 2


def test_a_model_goes_on_over_fewer_workers(undisturbed: tuple[list[float], dict[str, torch.Tensor]]) -> None:
    with ranks(4) as group, closing(group), group.connect(heal="shrink") as cluster:
        pipe = pipeline(cluster, model=model(), balance="parameters")
        losses = trained(pipe, group, {4: "worker1"})
        assert losses == undisturbed[0]
        assert same(pipe.state_dict(), undisturbed[1])
        assert ([worker.name for worker in cluster.workers], cluster.stand_ins) == (["worker0", "worker2"], ())
        assert [event.kind for event in cluster.events] == ["died", "stands in", "removed"]


def test_without_a_spare_a_death_is_an_error_until_the_rank_is_started_again(
    undisturbed: tuple[list[float], dict[str, torch.Tensor]],
) -> None:
    with ranks(3) as group, closing(group), group.connect() as cluster:
        pipe = pipeline(cluster, model=model())
        scheduler, losses = torch.optim.lr_scheduler.StepLR(pipe.optimizer, 2, 0.5), []
        tries = Counter[int]()
        while len(losses) < len(DATA):
            number = len(losses)
            if number == 4 and not tries[4]:
                group.kill(cluster, 2)
            tries[number] += 1
            if number == 4 and tries[4] == 1:
                with pytest.raises(rp.WorkerLost, match="Start the rank again"):
                    pipe.train_step(*DATA[number])
                group.start(2)
            with suppress(rp.WorkerLost):  # until it has joined
                losses.append(pipe.train_step(*DATA[number]).loss)
                scheduler.step()
        assert losses == undisturbed[0]
        assert same(pipe.state_dict(), undisturbed[1])
        assert (tries[4] > 1, tries.total() - tries[4]) == (True, len(DATA) - 1)
