"""Asynchronous training when something fails: every stage holds the same minibatches afterwards."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.stage import stream_rollback
from rpcpipe.stage.optimizer import LocalOptimizer
from support.local_cluster import LocalCluster
from support.models import adamw, batches, cross_entropy, mlp, sgd
from support.oracle import Versioned, assert_same_weights, train
from support.stream import POLICIES, SIZES, pipeline


def poisoned(where: int, value: float = float("nan"), count: int = 12) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for number, (x, y) in enumerate(batches(count)):
        yield (x * value if number == where else x), y


@pytest.mark.parametrize("policy", POLICIES)
def test_a_loss_that_is_not_finite_is_skipped_on_every_stage(policy: str, caplog: pytest.LogCaptureFixture) -> None:
    pipe = pipeline(3, policy)
    oracle = Versioned(mlp(), sgd, cross_entropy, SIZES[3])
    with caplog.at_level(logging.WARNING, logger="rpcpipe"):
        results = list(pipe.train(poisoned(5)))
    assert [result.applied for result in results] == [number != 5 for number in range(12)]
    assert "step 5: loss or gradient is not finite" in caplog.text
    for number, (x, y) in enumerate(batches(12)):
        used = {
            "stash": [max(0, number + 1 - (2 - r) - 1) for r in range(3)],
            "vertical_sync": [max(0, number + 1 - 3)] * 3,
            "2bw": [max(0, number - 1)] * 3,
        }[policy]
        if number == 5:
            oracle.skip()
        else:
            parts = list(zip(x.chunk(pipe.chunks), y.chunk(pipe.chunks), strict=True))
            oracle.step([(a, b, len(a) / len(x)) for a, b in parts], used)
    assert_same_weights(pipe, oracle.model)


def test_or_the_run_stops_before_it() -> None:
    pipe = pipeline(3, "stash", nonfinite="stop")
    with pytest.raises(rp.NonFiniteError, match=r"before number 5 .* are in the weights and numbers 5 to") as caught:
        list(pipe.train(poisoned(5)))
    assert isinstance(caught.value, rp.StageError)
    assert pipe.trained == 5
    oracle = Versioned(mlp(), sgd, cross_entropy, SIZES[3])
    train(oracle, batches(5), "stash", 3, 1)
    assert_same_weights(pipe, oracle.model)


def test_a_synchronous_step_stops_as_well() -> None:
    pipe = rp.Pipeline(mlp(), LocalCluster(2), loss=cross_entropy, optimizer=sgd, chunks=2, nonfinite="stop")
    before = pipe.state_dict()
    x, y = next(batches(1))
    with pytest.raises(rp.NonFiniteError, match="gradient"):
        pipe.train_step(x * float("nan"), y)
    assert all(torch.equal(before[name], value) for name, value in pipe.state_dict().items())
    assert pipe.trained == 0


class Fails(nn.Module):
    """Passes its input on; at the forward number ``at`` it raises, there or in the backward."""

    def __init__(self, phase: str, at: int) -> None:
        super().__init__()
        self.phase, self.at, self.calls = phase, at, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        out = x + 0
        if self.calls - 1 == self.at:
            if self.phase == "forward":
                raise LookupError("not in the forward")
            out.register_hook(_refuse)
        return out


def _refuse(_: torch.Tensor) -> None:
    raise LookupError("not in the backward")


def failing(phase: str, layer: int, at: int) -> nn.Sequential:
    model = mlp()
    model[layer] = nn.Sequential(model[layer], Fails(phase, at))
    return model


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("phase", "layer"), [("forward", 0), ("forward", 5), ("backward", 3), ("backward", 6)])
@pytest.mark.parametrize("where", [0, 1, 40])
def test_a_failure_leaves_every_stage_at_the_same_minibatch(policy: str, phase: str, layer: int, where: int) -> None:
    """Nothing half-applied; which minibatches are in is reported exactly, and the pipeline goes on."""
    chunks = 4 if policy == "2bw" else 1
    pipe = pipeline(3, policy, model=failing(phase, layer, (where + 1) * chunks - 1))
    with pytest.raises(LookupError, match=f"not in the {phase}") as caught:
        list(pipe.train(batches(50)))
    # No stage has applied what failed in a forward, or in a backward of the last stage. Else all go
    # back to the last common copy.
    kept = where if phase == "forward" or layer > 5 else stream_rollback.newest(where)
    assert pipe.trained == kept
    assert f"before number {kept} (pipe.trained) are in the weights" in str(caught.value)
    oracle = Versioned(failing(phase, layer, -1), sgd, cross_entropy, SIZES[3])
    data = list(batches(50))
    train(oracle, data[:kept], policy, 3, chunks)
    assert_same_weights(pipe, oracle.model)
    oracle.flush()
    again = data[kept : kept + 6]
    assert [r.loss for r in pipe.train(again)] == train(oracle, again, policy, 3, chunks)
    assert_same_weights(pipe, oracle.model)


def test_an_optimizer_that_fails_on_one_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline(3, "stash", optimizer=adamw)
    apply, calls = LocalOptimizer.apply, itertools.count()

    def flaky(self: LocalOptimizer, *args: Any) -> None:
        apply(self, *args)
        if len(self.parameters) == SIZES[3][1] * 2 and next(calls) == 35:  # the second stage's
            raise RuntimeError("no space left")

    monkeypatch.setattr(LocalOptimizer, "apply", flaky)
    with pytest.raises(rp.StageError, match=r"update of stage 1.*no space left"):
        list(pipe.train(batches(50)))
    assert pipe.trained == 32
    oracle = Versioned(mlp(), adamw, cross_entropy, SIZES[3])
    train(oracle, batches(32), "stash", 3, 1)
    assert_same_weights(pipe, oracle.model)


def test_an_optimizer_that_fails_half_way_leaves_nothing_of_its_update() -> None:
    class HalfWay(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for parameter in self.param_groups[0]["params"]:
                parameter.add_(1.0)
                raise RuntimeError("half-way")

    pipe = pipeline(3, "stash", optimizer=lambda params: HalfWay(params, lr=0.1))
    before = pipe.state_dict()
    with pytest.raises(rp.StageError, match="half-way"):
        list(pipe.train(batches(4)))
    assert pipe.trained == 0
    assert all(torch.equal(value, before[name]) for name, value in pipe.state_dict().items())


def test_a_lost_message_runs_into_the_deadline_and_all_stages_go_back_together() -> None:
    lost = iter([False] * 11 + [True])
    cluster: Any = LocalCluster(3, drop=lambda to, verb: verb.startswith("deliver") and next(lost, False), timeout=0.2)
    pipe = pipeline(3, "stash", cluster)
    before = pipe.state_dict()
    with pytest.raises(rp.DeadlineExceeded, match="waits for the input of") as caught:
        list(pipe.train(batches(20)))
    assert "before number 0 (pipe.trained)" in caught.value.__notes__[0]
    assert all(torch.equal(before[name], value) for name, value in pipe.state_dict().items())
    oracle = Versioned(mlp(), sgd, cross_entropy, SIZES[3])
    assert [r.loss for r in pipe.train(batches(6))] == train(oracle, batches(6), "stash", 3, 1)
