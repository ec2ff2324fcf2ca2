"""Workers die at any moment of a stream, and what comes out is what came out without."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from rpcpipe.stage import stream_rollback
from support.local_cluster import LocalCluster
from support.models import adamw, batches, mlp
from support.mortal_cluster import MortalCluster
from support.stream import pipeline

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
    "2bw that drains": ("2bw", {"chunks": 2, "optimizer": adamw}),
    "2bw, batched": ("2bw", {"dispatch": "batched", "optimizer": adamw}),
    "drained by turns": ("stash", {"flush_every": 3}),
}


def model() -> nn.Sequential:
    """With running statistics, which every forward changes."""
    layers = list(mlp())
    return nn.Sequential(nn.Sequential(layers[0], nn.BatchNorm1d(12)), *layers[1:6], nn.BatchNorm1d(12), layers[7])


def figures(result: Any) -> tuple[Any, ...]:
    return result.step, result.loss, result.grad_norm, result.applied, result.lr, result.versions, result.staleness


class Run:
    """What a run shows: results as they come and as callbacks see them, the scheduler's count, the state at the end."""

    def __init__(self, cluster: Any, case: str, **changed: Any) -> None:
        policy, options = CASES[case]
        self.cluster, self.seen, self.told = cluster, list[Any](), list[Any]()
        self.pipe = pipeline(STAGES, policy, cluster, **({"model": model()} | options | changed))
        self.pipe.on_step(lambda result: self.told.append(figures(result)))
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.pipe.optimizer, 2, 0.9)

    def train(self, data: Iterator[Any]) -> None:
        self.cluster.deadly = True
        for result in self.pipe.train(data):
            self.seen.append(figures(result))
            self.scheduler.step()
            if len(self.seen) == 5:
                self.seen.append(self.pipe.evaluate(batches(2)))
        self.cluster.deadly = False

    def step_by_step(self, data: Iterator[Any]) -> None:
        self.cluster.deadly = True
        for batch in data:
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
        assert torch.equal(value, other[1][name]), name


@pytest.mark.parametrize("every", [2, 4, 32])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.timeout(120)
def test_streaming_gives_the_bits_of_a_run_without_deaths(
    case: str, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_rollback, "EVERY", every)
    expected = Run(LocalCluster(STAGES, 1), case)
    expected.train(batches(14, 12))
    wanted, deaths = expected.outcome(), 0
    for seed in range(2):
        run = Run(MortalCluster(STAGES, seed, rarity=200), case)
        run.train(batches(14, 12))
        assert_same(run.outcome(), wanted)
        deaths += run.cluster.deaths
    assert deaths > 2


@pytest.mark.parametrize("case", CASES)
def test_single_steps_give_the_bits_of_a_run_without_deaths(case: str) -> None:
    expected, run = Run(LocalCluster(STAGES, 1), case), Run(MortalCluster(STAGES, 1, rarity=60), case)
    for one in (expected, run):
        one.step_by_step(batches(6, 12))
    assert_same(run.outcome(), expected.outcome())
    assert run.cluster.deaths > 2
