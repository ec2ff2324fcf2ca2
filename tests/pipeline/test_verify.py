"""rp.verify: a pipeline that is right is found right, and one that is made wrong is found out, by layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.pipeline import plain_loop
from support.local_cluster import LocalCluster
from support.models import adamw, summed


class InThisProcess:
    """Does a job here: what a process of its own adds has a test below."""

    def __init__(self, job: plain_loop.Job) -> None:
        self._job = job

    def result(self, seconds: float) -> list[plain_loop.Update]:
        assert seconds >= 60
        return list(plain_loop.PlainLoop(copy.deepcopy(self._job)).run())

    def close(self) -> None:
        pass


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpcpipe.pipeline.verification.PlainProcess", InThisProcess)


def layers() -> list[Any]:
    torch.manual_seed(0)
    return [
        nn.Linear(8, 16), nn.Sequential(nn.Dropout(0.1), nn.BatchNorm1d(16)), rp.LayerSpec(nn.Linear, 16, 16),
        nn.ReLU(), nn.Linear(16, 4),
    ]  # fmt: skip


def tied() -> list[Any]:
    first, second = (rp.LayerSpec(nn.Linear, 8, 8, bias=False, tied="w") for _ in range(2))
    return [first, nn.Tanh(), second, nn.Linear(8, 4)]


def batch(size: int = 22) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(size, 8), torch.randint(0, 4, (size,))


def pipeline(model: Any, cluster: Any = None, **options: Any) -> rp.Pipeline:
    workers = options.get("replicas", 1) * 2
    given = {
        "loss": nn.functional.cross_entropy,
        "optimizer": adamw,
        "chunks": 4,
        "balance": [2, len(model) - 2],
    } | options
    return rp.Pipeline(model, cluster or LocalCluster(workers), **given)


CASES: dict[str, dict[str, Any]] = {
    "1f1b": {},
    "zb-h1": {"schedule": "zb-h1", "checkpoint": "always"},
    "clipped": {"clip_grad_norm": 0.1},
    "accumulated": {"accumulate": 3},
    "bfloat16": {"autocast": torch.bfloat16},
    "float16": {"autocast": torch.float16},
    "sums": {"loss": summed},
    "replicas": {"replicas": 2},
    "sharded": {"replicas": 2, "shard_optimizer": True, "accumulate": 2},
    "deferred": {"batch_norm": "deferred"},
}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("case", CASES)
def test_a_pipeline_that_is_right_is_found_right_and_left_as_it_was(case: str) -> None:
    pipe, undisturbed = (pipeline(layers(), **CASES[case]) for _ in range(2))
    x, y = batch()
    calls: list[rp.StepResult] = []
    for one in (pipe, undisturbed):
        for _ in range(one.accumulate):
            one.train_step(x, y)
    pipe.on_step(calls.append)
    verification = rp.verify(pipe, x, y)
    assert verification, verification
    assert verification.exact or verification.tolerance
    assert ("to the bit" if verification.exact else "within") in str(verification)
    assert not calls
    results = [one.train_step(x, y) for one in (pipe, undisturbed)]
    assert (results[0].loss, results[0].grad_norm, results[0].step) == (
        results[1].loss, results[1].grad_norm, results[1].step,
    )  # fmt: skip
    for one in (pipe, undisturbed):
        for _ in range(one.accumulate - 1):
            one.train_step(x, y)
    after, expected = pipe.state_dict(), undisturbed.state_dict()
    assert all(torch.equal(after[key], value) for key, value in expected.items())


@pytest.mark.usefixtures("here")
def test_tied_weights_are_compared_within_what_the_docs_promise() -> None:
    x, y = batch()
    model = tied()
    for layers_of_user in (model, tied()):
        pipe = pipeline(layers_of_user, optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
        if layers_of_user is not model:
            layers_of_user.clear()
        verification = rp.verify(pipe, x, y)
        assert verification, verification
        assert verification.tolerance > 0


def louder(index: int) -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        module[index].register_forward_hook(lambda layer, inputs, output: output * 1.5)  # type: ignore[index]

    return change


def flipped(module: nn.Module) -> None:
    module[0].weight.register_hook(torch.neg)  # type: ignore[index, union-attr]


def drifting(module: nn.Module) -> None:
    module[1][1].momentum = 0.5  # type: ignore[index, union-attr]


WRONG: list[tuple[int, Callable[[nn.Module], None], str]] = [
    (0, louder(1), "layer 1, output, in step 0: differs"),
    (1, louder(0), "layer 2, output, in step 0: differs"),
    (1, flipped, "layer 2, weight, in step 0: differs by"),
    (0, drifting, "layer 1, 1.running_mean, in step 0: differs by"),
]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("stage", "change", "message"), WRONG)
def test_the_first_layer_that_differs_is_named(stage: int, change: Any, message: str) -> None:
    model = layers()
    pipe = pipeline(model)
    pipe.stages[stage].call(change)
    verification = rp.verify(pipe, *batch())
    assert not verification
    assert message in str(verification)


@pytest.mark.usefixtures("here")
def test_what_cannot_be_verified_is_refused() -> None:
    x, y = batch()
    with pytest.raises(rp.ScheduleError, match="older weights on purpose"):
        rp.verify(pipeline(layers(), schedule="pipedream"), x, y)
    with pytest.raises(rp.ArgumentError, match="steps must be at least 1, not 0"):
        rp.verify(pipeline(layers()), x, y, steps=0)
    pipe = pipeline(layers(), accumulate=2)
    pipe.train_step(x, y)
    with pytest.raises(rp.StateError, match="verify after the one that updates"):
        rp.verify(pipe, x, y)


@pytest.mark.usefixtures("here")
def test_modules_that_the_user_has_dropped_come_from_the_workers() -> None:
    pipe = pipeline(layers())  # nothing here refers to its modules
    assert pipe.recipe.layers() is None
    assert rp.verify(pipe, *batch())


class Remembering(nn.Linear):
    """Has a state that no state_dict holds."""

    def __init__(self) -> None:
        super().__init__(16, 4)
        self.calls = 0
        self.register_buffer("mean", torch.zeros(()), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return super().forward(x) * (1 + 0.01 * self.calls) + self.mean


@pytest.mark.usefixtures("here")
def test_what_layers_remember_of_earlier_steps_goes_along() -> None:
    model = [*layers()[:4], Remembering()]
    pipe, (x, y) = pipeline(model), batch()
    assert rp.verify(pipe, x, y).exact
    for _ in range(3):
        pipe.train_step(x, y)
    verification = rp.verify(pipe, x, y)
    assert verification.exact, verification


def test_the_plain_loop_runs_in_a_process_of_its_own(cluster: rp.Cluster) -> None:
    model = layers()
    pipe = pipeline(model, cluster)
    assert rp.verify(pipe, *batch())
    pipe.close()
    failing = pipeline([nn.Linear(8, 4), Fails()], cluster, balance=[1, 1])
    with pytest.raises(rp.ModelError, match=r"(?s)one process cannot do what the pipeline did.*not in one process"):
        rp.verify(failing, *batch())
    failing.close()


class Fails(nn.Module):
    """Works on a worker alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        import sys

        if "rpcpipe.worker.main" not in sys.modules:
            raise RuntimeError("not in one process")
        return x


class Counting(nn.Linear):
    """Goes on from a number and a generator of its own."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.factor, self.generator = 1.0, torch.Generator().manual_seed(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.factor *= 0.9
        return super().forward(x) * self.factor + torch.rand(8, generator=self.generator)


def test_what_layers_hold_in_attributes_is_put_back(here: None) -> None:
    pipes = []
    for _ in range(2):
        torch.manual_seed(0)
        pipes.append(pipeline([rp.LayerSpec(Counting), nn.Tanh(), nn.Linear(8, 4)], balance=[2, 1]))
    assert rp.verify(pipes[0], *batch())
    assert pipes[0].train_step(*batch()).loss == pipes[1].train_step(*batch()).loss
