"""Workers die at any moment of a stream, and what comes out is what came out without."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.stage import stream_rollback
from support.local_cluster import LocalCluster
from support.models import adamw, batches, mlp
from support.mortal_cluster import MortalCluster
from support.stream import SIZES, pipeline

STAGES = 3
# Of the weights; the number of micro-batches of a batch; and what else is different.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "stash": ("stash", {}),
    "stash of three": ("stash", {"chunks": 3, "optimizer": adamw}),
    "stash, batched": ("stash", {"dispatch": "batched", "optimizer": adamw, "clip_grad_norm": 0.05}),
    "stash, recomputed": ("stash", {"checkpoint": "always"}),
    "vertical_sync": ("vertical_sync", {"optimizer": adamw}),
    "vertical_sync, batched": ("vertical_sync", {"dispatch": "batched", "chunks": 2}),
    "latest": ("latest", {}),
    "latest of two": ("latest", {"chunks": 2, "optimizer": adamw, "dispatch": "batched"}),
    "latest, recomputed": ("latest", {"checkpoint": "always"}),
    "2bw": ("2bw", {}),
    "2bw that drains": ("2bw", {"model": mlp, "optimizer": adamw}),
    "2bw, batched": ("2bw", {"dispatch": "batched", "optimizer": adamw}),
    "drained by turns": ("stash", {"flush_every": 3}),
    "not finite": ("stash", {"chunks": 2}),
}


def model() -> nn.Sequential:
    """With running statistics, which every forward changes."""
    layers = list(mlp())
    return nn.Sequential(nn.Sequential(layers[0], nn.BatchNorm1d(12)), *layers[1:6], nn.BatchNorm1d(12), layers[7])


def data(case: str, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches; some of them too small for all micro-batches, or not finite, where the case is that."""
    for number, (inputs, targets) in enumerate(batches(count, 12)):
        size = 2 if case == "2bw that drains" and number % 3 == 1 else 12
        yield inputs[:size] * (float("inf") if case == "not finite" and number % 4 == 2 else 1.0), targets[:size]


def figures(result: Any) -> tuple[Any, ...]:
    return result.step, result.loss, result.grad_norm, result.applied, result.lr, result.versions, result.staleness


class Run:
    """What a run shows: results as they come and as callbacks see them, the scheduler's count, the state at the end."""

    def __init__(self, cluster: Any, case: str, **changed: Any) -> None:
        policy, options = CASES[case]
        self.cluster, self.seen, self.told = cluster, list[Any](), list[Any]()
        self.pipe = pipeline(STAGES, policy, cluster, **(options | {"model": options.get("model", model)()} | changed))
        self.pipe.on_step(lambda result: self.told.append(figures(result)))
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.pipe.optimizer, 2, 0.9)

    def train(self, given: Iterator[Any]) -> None:
        self.cluster.deadly = True
        for result in self.pipe.train(given):
            self.seen.append(figures(result))
            self.scheduler.step()
            if len(self.seen) == 5:
                self.seen.append(self.pipe.evaluate(batches(2)))
        self.cluster.deadly = False

    def step_by_step(self, given: Iterator[Any]) -> None:
        self.cluster.deadly = True
        for batch in given:
            self.seen.append(figures(self.pipe.train_step(*batch)))
            self.scheduler.step()
        self.cluster.deadly = False

    def outcome(self) -> tuple[Any, ...]:
        state = dict(self.pipe.state_dict())
        [group] = self.pipe.optimizer.param_groups
        shown = repr((self.seen, self.told, self.pipe.trained, self.scheduler.last_epoch, group["lr"]))
        self.pipe.close()
        return shown, state


def assert_same(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    for name, value in one[1].items():
        assert torch.equal(value.nan_to_num(), other[1][name].nan_to_num()), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.timeout(120)
def test_streaming_gives_the_bits_of_a_run_without_deaths(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every few updates a snapshot is due, so that the stream goes on from all kinds."""
    expected = Run(LocalCluster(STAGES, 1), case)
    count = 12 if expected.pipe.chunks == 1 else 9
    expected.train(data(case, count))
    # A death in a stream without snapshots costs all of it: about one try in five comes to its end.
    wanted, deaths, rarity = expected.outcome(), 0, expected.cluster.transport.turns * 2 // 3
    for seed, every in enumerate((2, 3, 32)):
        monkeypatch.setattr(stream_rollback, "EVERY", every)
        run = Run(MortalCluster(STAGES, seed, rarity=rarity), case)
        run.train(data(case, count))
        assert_same(run.outcome(), wanted)
        deaths += run.cluster.deaths
    assert deaths > 2


@pytest.mark.parametrize("case", CASES)
def test_single_steps_give_the_bits_of_a_run_without_deaths(case: str) -> None:
    expected = Run(LocalCluster(STAGES, 1), case)
    expected.step_by_step(data(case, 6))
    run = Run(MortalCluster(STAGES, 1, rarity=expected.cluster.transport.turns // 6), case)
    run.step_by_step(data(case, 6))
    assert_same(run.outcome(), expected.outcome())
    assert run.cluster.deaths > 2


@pytest.mark.parametrize("worker", range(STAGES))
@pytest.mark.parametrize("case", ["stash", "vertical_sync", "latest", "2bw"])
def test_a_death_while_the_stream_is_idle_is_noticed_by_the_next_call(
    case: str, worker: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_rollback, "EVERY", 4)
    run = Run(MortalCluster(STAGES, 1), case)
    train_killing(run, case, worker)
    assert_same(run.outcome(), evaluated_between_results(case))
    assert run.cluster.deaths > 3


def train_killing(run: Run, case: str, worker: int | None) -> None:
    """Train, kill ``worker`` after every result, and evaluate after some."""
    for result in run.pipe.train(data(case, 12)):
        run.seen.append(figures(result))
        run.scheduler.step()
        if worker is not None:
            run.cluster.kill(f"worker{worker}")
        if result.step % 3 == 1:
            run.seen.append(run.pipe.evaluate(batches(1)))


@cache
def evaluated_between_results(case: str) -> tuple[Any, ...]:
    """What comes out without deaths."""
    run = Run(LocalCluster(STAGES, 1), case)
    train_killing(run, case, None)
    return run.outcome()


@pytest.mark.parametrize("policy", ["stash", "2bw"])
def test_a_layer_that_raises_is_reported_as_without_deaths(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its counter of calls is no part of what is restored, so it raises by the input."""
    monkeypatch.setattr(stream_rollback, "EVERY", 4)

    def attempt(cluster: Any) -> tuple[str, int, dict[str, Any]]:
        layers = list(mlp())
        pipe = pipeline(STAGES, policy, cluster, model=nn.Sequential(Refuses(), *layers))
        cluster.deadly = True
        with pytest.raises(rp.StageError) as caught:
            for _ in pipe.train((x + 1000.0 * (number == 9), y) for number, (x, y) in enumerate(batches(12))):
                pass
        cluster.deadly = False
        text = str(caught.value)
        return text[text.index("On every stage") :], pipe.trained, dict(pipe.state_dict())

    monkeypatch.setitem(SIZES, STAGES, [4, 2, 3])
    alive, died = LocalCluster(STAGES, 1), 0
    story, trained, state = attempt(alive)
    for seed in range(4):
        cluster = MortalCluster(STAGES, seed, rarity=alive.transport.turns // 2)
        again, count, after = attempt(cluster)
        assert (again, count) == (story, trained)
        assert all(torch.equal(value, after[name]) for name, value in state.items())
        died += cluster.deaths
    assert died > 2


class Refuses(nn.Module):
    """Passes on what is small."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if float(x.max()) > 500:
            raise LookupError("too large")
        return x


def test_a_stream_in_which_workers_die_too_often_says_which_minibatches_are_in_and_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream_rollback, "EVERY", 4)
    cluster = MortalCluster(STAGES, 1, heal=2)
    pipe, whole = pipeline(STAGES, "stash", cluster), pipeline(STAGES, "stash", LocalCluster(STAGES, 1))
    given = list(batches(16))
    results = pipe.train(given)
    losses = [next(results).loss for _ in range(6)]
    cluster.rarity, cluster.deadly = 12, True
    with pytest.raises(rp.WorkerLost, match="died in each of 3 tries of one call") as caught:
        losses += [result.loss for result in results]
    cluster.deadly = False
    [note] = caught.value.__notes__
    count = pipe.trained
    assert count % 4 == 0
    assert f"before number {count} (pipe.trained) are in the weights" in note
    list(whole.train(given[:count]))
    state = whole.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in pipe.state_dict().items())
    assert [r.loss for r in pipe.train(given[count:])] == [r.loss for r in whole.train(given[count:])]
