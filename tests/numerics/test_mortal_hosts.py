"""Hosts die, with all that their workers held, and what comes out is what came out without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from numerics.test_mortal_workers import check_calls, train, train_alive
from numerics.test_steps_ahead import OPTIONS, model, pipeline, same
from support.local_cluster import LocalCluster
from support.models import batches
from support.mortal_hosts import MortalHosts


def test_a_host_dies_between_two_steps() -> None:
    expected, after, _ = train_alive("1f1b")
    cluster = MortalHosts(2, 0)
    pipe = pipeline(cluster, model=model())
    scheduler, losses = torch.optim.lr_scheduler.StepLR(pipe.optimizer, 2, 0.5), []
    for result in pipe.train(batches(8, 24)):
        losses.append(result.loss)
        scheduler.step()
        if result.step == 3:
            cluster.lose_host("worker0")
    assert losses == [loss for _, loss, *_ in expected]
    assert same(pipe.state_dict(), after)
    assert pipe.runtime.history.restored == 1


def test_snapshots_that_are_given_up_leave_the_newest_as_it_is() -> None:
    cluster = MortalHosts(2, 0)
    pipe, alone = pipeline(cluster, model=model()), pipeline(LocalCluster(2, 1), model=model())
    history: Any = pipe.runtime.history
    for number, batch in enumerate(batches(8, 24)):
        if number == 5:
            assert history.safe
            for _ in range(2):  # of which one has the newest's place, if they have places in turn
                history._snapshots.take()
                pipe.evaluate([batch])  # by when the workers have taken it
                history.lose()  # as a worker that dies does
            cluster.lose_host("worker1")
        assert pipe.train_step(*batch).loss == alone.train_step(*batch).loss
    assert history.restored == 1
    assert same(pipe.state_dict(), alone.state_dict())


def test_a_snapshot_under_way_when_a_host_dies_is_no_snapshot() -> None:
    cluster = MortalHosts(2, 0)
    pipe = pipeline(cluster, model=model())
    history: Any = pipe.runtime.history
    for number, batch in enumerate(batches(6, 24)):
        if number == 5:
            history._snapshots.take()
            pipe.evaluate([batch])  # by when the workers have taken it
            cluster.lose_host("worker0")
        pipe.train_step(*batch)
    assert history.restored == 1
    places = {copy.host for copies in history._snapshots._newest.values() for copy in copies if copy.kept.alive}
    assert places <= set(cluster.hosts().values())


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.timeout(120)
def test_training_gives_the_bits_of_a_run_without_deaths(name: str) -> None:
    workers, losses = 2 * OPTIONS[name].get("replicas", 1), 0
    expected, after, turns = train_alive(name)
    for seed in range(8):
        cluster = MortalHosts(workers, seed, rarity=3 * turns)
        figures, state = train(cluster, OPTIONS[name], seed % 2)
        assert repr(figures) == repr(expected)
        assert same(state, after)
        losses += cluster.losses
        if losses > 2:
            return
    raise AssertionError("no host died")


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.timeout(120)
def test_calls_between_results_give_the_bits_of_a_run_without_deaths(name: str, tmp_path: Path) -> None:
    workers, number = 2 * OPTIONS[name].get("replicas", 1), list(OPTIONS).index(name)
    cluster = MortalHosts(workers, number, rarity=7 * train_alive(name)[2])
    check_calls(name, cluster, tmp_path, raises=False)
