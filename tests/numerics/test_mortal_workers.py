"""Workers die at any moment, and what comes out is what came out without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from numerics.test_steps_ahead import OPTIONS, model, pipeline, same
from rpcpipe.errors import WorkerLost
from support.local_cluster import LocalCluster
from support.models import adamw, batches
from support.mortal_cluster import MortalCluster


def train(cluster: Any, options: dict[str, Any], ahead: int) -> tuple[list[Any], dict[str, torch.Tensor]]:
    pipe = pipeline(cluster, **options, model=model())
    cluster.deadly = True
    figures = []
    scheduler = torch.optim.lr_scheduler.StepLR(pipe.optimizer, 2, 0.5)
    for result in pipe.train(batches(8, 24), ahead=ahead):
        figures.append((result.step, result.loss, result.grad_norm, result.applied, result.lr, result.accumulated))
        scheduler.step()
    cluster.deadly = False
    state = dict(pipe.state_dict())
    pipe.close()
    return figures, state


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ahead", [0, 1])
def test_workers_that_die_between_two_results(ahead: int, seed: int) -> None:
    expected, after = train(LocalCluster(2, 1), {}, 0)
    cluster = MortalCluster(2, seed)
    pipe = pipeline(cluster, model=model())
    scheduler, losses = torch.optim.lr_scheduler.StepLR(pipe.optimizer, 2, 0.5), []
    for result in pipe.train(batches(8, 24), ahead=ahead):
        losses.append(result.loss)
        scheduler.step()
        for _ in range(200):  # let a step ahead go on
            cluster.transport.wait([cluster.transport.call("worker0", "clock")], 1.0)
        cluster.kill(f"worker{result.step % 2}")
        if result.step % 3 == 0:
            cluster.kill(f"worker{1 - result.step % 2}")
    assert losses == [loss for _, loss, *_ in expected]
    assert same(pipe.state_dict(), after)


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.timeout(120)
def test_training_gives_the_bits_of_a_run_without_deaths(name: str, ahead: int) -> None:
    workers = 2 * OPTIONS[name].get("replicas", 1)
    expected, after = train(LocalCluster(workers, 1), OPTIONS[name], 0)
    for seed in range(2):
        cluster = MortalCluster(workers, seed, rarity=40)
        figures, state = train(cluster, OPTIONS[name], ahead)
        assert repr(figures) == repr(expected)
        assert same(state, after)
        assert cluster.deaths > 2


def train_and_load(cluster: Any, folder: Path) -> dict[str, torch.Tensor]:
    """Train, and go on from what was saved after each step; returns the weights."""
    pipe = pipeline(cluster, **OPTIONS["adamw"], model=model())
    for batch in batches(6, 24):
        pipe.train_step(*batch)
        cluster.deadly = True
        pipe.save(folder, position=pipe.trained)
        assert pipe.load(folder) == pipe.trained
        cluster.deadly = False
    state = dict(pipe.state_dict())
    pipe.close()
    return state


@pytest.mark.timeout(60)
def test_saves_and_loads_are_made_again_when_workers_die_in_them(tmp_path: Path) -> None:
    expected = train_and_load(LocalCluster(2, 1), tmp_path / "undisturbed")
    for seed in range(4):
        cluster = MortalCluster(2, seed, rarity=12)
        assert same(train_and_load(cluster, tmp_path / str(seed)), expected)
        assert cluster.deaths > 2


def test_a_pipeline_is_made_again_when_workers_die_while_it_is_made() -> None:
    deaths = 0
    for seed in range(8):
        cluster = MortalCluster(2, seed, rarity=6)
        cluster.deadly = True
        pipe = pipeline(cluster, model=model())
        cluster.deadly = False
        deaths += cluster.deaths
        pipe.train_step(*next(batches(1, 24)))
        assert same(dict(pipe.state_dict()), after_one_step())
        pipe.close()
    assert deaths > 2


def after_one_step() -> dict[str, torch.Tensor]:
    pipe = pipeline(LocalCluster(2, 1), model=model())
    pipe.train_step(*next(batches(1, 24)))
    return dict(pipe.state_dict())


@pytest.mark.parametrize("schedule", ["pipedream", "pipedream-2bw"])
@pytest.mark.timeout(120)
def test_a_stream_that_loses_a_worker_goes_back_to_a_snapshot_and_may_be_fed_again(schedule: str) -> None:
    went_back = 0
    for seed in range(4):
        cluster = MortalCluster(2, seed, rarity=150)
        pipe, data = pipeline(cluster, schedule=schedule, optimizer=adamw, model=model()), list(batches(12, 24))
        updates = pipe.chunks if schedule == "pipedream" else 1
        cluster.deadly = True
        try:
            list(pipe.train(data))
        except WorkerLost:
            cluster.deadly = False
            assert pipe.trained % updates == 0
            went_back += 1
        cluster.deadly, done = False, pipe.trained // updates
        list(pipe.train(data[done:]))
        undisturbed = pipeline(LocalCluster(2, 1), schedule=schedule, optimizer=adamw, model=model())
        list(undisturbed.train(data[:done]))
        list(undisturbed.train(data[done:]))
        assert same(parameters(pipe), parameters(undisturbed))
    assert went_back > 1


def parameters(pipe: Any) -> dict[str, torch.Tensor]:
    """The weights alone: a stream takes buffers back for no failure."""
    return {name: value for name, value in pipe.state_dict().items() if not name.endswith("forwards")}
