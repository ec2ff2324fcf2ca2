"""Workers die at any moment, and what comes out is what came out without."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

import rpcpipe as rp
from numerics import test_steps_ahead
from numerics.test_steps_ahead import OPTIONS, Calls, model, pipeline, same
from rpcpipe import schedules
from support.local_cluster import LocalCluster
from support.models import adamw, batches
from support.mortal_cluster import MortalCluster
from support.seeds import some

T = TypeVar("T")


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


@cache
def train_alive(name: str) -> tuple[list[Any], dict[str, torch.Tensor], int]:
    """What training with an option gives without deaths, and how many turns of the transport a step takes."""
    cluster = LocalCluster(2 * OPTIONS[name].get("replicas", 1), 1)
    figures, state = train(cluster, OPTIONS[name], 0)
    return figures, state, cluster.transport.turns // 8


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ahead", [0, 1])
def test_workers_that_die_between_two_results(ahead: int, seed: int) -> None:
    expected, after, _ = train_alive("1f1b")
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
    expected, after, turns = train_alive(name)
    for seed in some(range(2), 1):
        cluster = MortalCluster(workers, seed, rarity=turns)
        figures, state = train(cluster, OPTIONS[name], ahead)
        assert repr(figures) == repr(expected)
        assert same(state, after)
        assert cluster.deaths > 2


class UncountedCalls(Calls):
    """The same, which leaves no trace of evaluations: one that is made again runs forwards twice on who lives."""

    def do_evaluate(self) -> Any:
        return self._without_trace(super().do_evaluate)

    def do_predict(self) -> Any:
        return self._without_trace(super().do_predict)

    def _without_trace(self, call: Callable[[], T]) -> T:
        before = self.pipe.state_dict()
        result = call()
        self.pipe.load_state_dict(before)
        return result


class MortalCalls(UncountedCalls):
    """The same, in which workers die; what does not heal by itself is made again."""

    def some(self) -> None:
        self.pipe.cluster.deadly = True  # type: ignore[attr-defined]
        super().some()

    def do_step_by_hand(self) -> Any:
        return again(super().do_step_by_hand)

    def do_give_a_step_up(self) -> Any:
        return again(super().do_give_a_step_up)

    def do_change_schedule(self) -> Any:
        self.pipe.cluster.deadly = False  # type: ignore[attr-defined]
        super().do_change_schedule()
        self.pipe.cluster.deadly = True  # type: ignore[attr-defined]


def again(call: Callable[[], T]) -> T:
    for _ in range(50):
        try:
            return call()
        except rp.WorkerLost:
            continue
    raise AssertionError("workers die in every try")


def check_calls(name: str, mortal: MortalCluster, folder: Path, *, raises: bool) -> None:
    """Random calls between results, on workers that die, give what they give on workers that do not."""
    number = list(OPTIONS).index(name)
    figures, seen, state = test_steps_ahead.train(
        OPTIONS[name], number, folder / "mortal", ahead=number % 2, raises=raises, cluster=mortal, calling=MortalCalls
    )
    expected, given, after = test_steps_ahead.train(
        OPTIONS[name], number, folder / "alive", ahead=0, raises=raises, calling=UncountedCalls
    )
    assert repr(figures) == repr(expected)
    assert repr(seen) == repr(given)
    assert same(state, after)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.timeout(120)
def test_calls_between_results_give_the_bits_of_a_run_without_deaths(name: str, tmp_path: Path) -> None:
    workers, number = 2 * OPTIONS[name].get("replicas", 1), list(OPTIONS).index(name)
    mortal = MortalCluster(workers, number, rarity=2 * train_alive(name)[2])
    check_calls(name, mortal, tmp_path, raises=number % 4 > 1)
    assert mortal.deaths > 1


SYNCHRONOUS = [name for name in schedules.names() if schedules.weight_versions.choose(name, None) is None]


@pytest.mark.parametrize("schedule", SYNCHRONOUS)
def test_every_synchronous_schedule_heals(schedule: str) -> None:
    virtual = schedules.suited_virtual_stages(schedule, 1)
    options = {"schedule": schedule, "virtual_stages": virtual, "optimizer": adamw}
    alive = LocalCluster(2, 1)
    expected, after = train(alive, options, 0)
    number = SYNCHRONOUS.index(schedule)
    cluster = MortalCluster(2, number, rarity=alive.transport.turns // 8)
    figures, state = train(cluster, options, number % 2)
    assert repr(figures) == repr(expected)
    assert same(state, after)
    assert cluster.deaths > 2


def test_survivors_drop_what_they_have_built_of_a_pipeline_that_is_built_again() -> None:
    deaths = 0
    for seed in range(8):
        cluster: Any = MortalCluster(2, seed, rarity=6)
        cluster.deadly = True
        pipe = pipeline(cluster, model=model())
        cluster.deadly = False
        pipe.state_dict()  # has the last dead replaced
        cluster.transport.wait([Future()], 0)  # until nothing is under way
        actors = [set(endpoint.actors) for endpoint in cluster.transport.endpoints.values()]
        assert actors == [{pipe.runtime.driver._pipeline}] * 2
        deaths += cluster.deaths
    assert deaths > 2
