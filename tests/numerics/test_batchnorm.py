"""Running statistics: of every micro-batch, or the whole batch's; never those of a step that failed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.model import batchnorm
from rpcpipe.stage.optimizer import LocalOptimizer
from support.local_cluster import LocalCluster
from support.models import adamw, batches, cross_entropy, sgd
from support.oracle import Natural, assert_same_run, assert_same_weights

NORMS: list[tuple[Callable[..., nn.Module], tuple[int, ...]]] = [
    (nn.BatchNorm1d, ()),
    (nn.BatchNorm1d, (4,)),
    (nn.BatchNorm2d, (3, 4)),
    (nn.BatchNorm3d, (2, 3, 2)),
]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(("kind", "shape"), NORMS)
def test_running_statistics_are_the_whole_batchs(
    kind: Callable[..., nn.Module], shape: tuple[int, ...], momentum: float | None
) -> None:
    """Uneven micro-batches, far from zero mean; every micro-batch's output is the ordinary layer's to the bit."""
    whole, each = kind(5, momentum=momentum), kind(5, momentum=momentum)
    deferred = batchnorm.defer(nn.Sequential(kind(5, momentum=momentum)))
    [norm] = batchnorm.deferred(deferred)
    assert type(norm).__mro__[2] is kind
    for _ in range(3):
        x = torch.randn(11, 5, *shape) * 3 + 50
        whole(x)
        for part in x.split([4, 4, 3]):
            assert torch.equal(deferred(part), each(part))
        assert not torch.equal(norm.running_mean, whole.running_mean)  # type: ignore[arg-type]
        norm.commit()
        torch.testing.assert_close(norm.running_mean, whole.running_mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(norm.running_var, whole.running_var, rtol=1e-6, atol=1e-6)
        assert norm.num_batches_tracked == whole.num_batches_tracked
        norm.commit()
        assert norm.num_batches_tracked == whole.num_batches_tracked  # nothing was pending
    assert list(norm.state_dict()) == list(whole.state_dict())
    torch.testing.assert_close(norm.eval()(x), whole.eval()(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="expected"):
        norm.train()(torch.randn(5))


def test_what_cannot_be_deferred() -> None:
    with pytest.raises(rp.ModelError, match="not SyncBatchNorm"):
        batchnorm.defer(nn.Sequential(nn.SyncBatchNorm(4)))
    untracked = nn.BatchNorm1d(4, track_running_stats=False)
    assert type(batchnorm.defer(untracked)) is nn.BatchNorm1d
    with pytest.raises(ValueError, match="batch_norm must be one of"):
        pipeline(LocalCluster(2), batch_norm="late")
    for schedule in ("pipedream", "pipedream-2bw"):
        with pytest.raises(rp.ScheduleError, match="batch_norm='deferred' waits"):
            pipeline(LocalCluster(2), batch_norm="deferred", schedule=schedule)


def model() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.BatchNorm1d(12),
        nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Dropout(0.1), nn.ReLU()),
        nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16, momentum=None), nn.ReLU()),
        nn.Linear(16, 4),
    )


def pipeline(cluster: Any, **changed: Any) -> rp.Pipeline:
    arguments = {"loss": cross_entropy, "optimizer": sgd, "chunks": 3} | changed
    return rp.Pipeline(model(), cluster, **arguments)


class Whole(Natural):
    """A plain loop whose BatchNorms normalise by micro-batch, and track what they saw of the batch as one."""

    def train_step(self, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        norms = [module for module in self.model.modules() if isinstance(module, nn.BatchNorm1d)]
        before = [copy.deepcopy(norm) for norm in norms]
        seen: list[list[torch.Tensor]] = [[] for _ in norms]
        hooks = [
            norm.register_forward_pre_hook(lambda _, given, at=at: seen[at].append(given[0].detach().clone()))
            for at, norm in enumerate(norms)
        ]
        loss = super().train_step(inputs, targets)
        for norm, old, parts, hook in zip(norms, before, seen, hooks, strict=True):
            hook.remove()
            old(torch.cat(parts))
            for mine, whole in zip(norm.buffers(), old.buffers(), strict=True):
                mine.copy_(whole)
        return loss


def assert_close_run(pipe: rp.Pipeline, loop: Natural, data: Iterator[Any]) -> None:
    for inputs, targets in data:
        assert pipe.train_step(inputs, targets).loss == loop.train_step(inputs, targets)
    state = pipe.state_dict()
    for name, value in loop.model.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(state[name], value), name


@pytest.mark.parametrize("checkpoint", ["never", "always", 0.5])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zb-h1"])
def test_deferred_in_a_pipeline(schedule: str, checkpoint: Any) -> None:
    """Weights to the bit (normalisation stays by micro-batch), statistics within 1e-6; recomputation counts once."""
    pipe = pipeline(LocalCluster(3), schedule=schedule, checkpoint=checkpoint, batch_norm="deferred")
    assert_close_run(pipe, Whole(model(), sgd, cross_entropy, 3), batches(4, 11))


def test_deferred_through_rpc_with_accumulation_and_a_change_of_schedule(cluster: rp.Cluster) -> None:
    pipe = pipeline(cluster, batch_norm="deferred", accumulate=2, balance=[2, 1, 1], chunks=6)
    loop = Whole(model(), sgd, cross_entropy, 6, accumulate=2)
    assert_close_run(pipe, loop, batches(3, 12))
    pipe.evaluate(batches(1))
    pipe.schedule = "gpipe"
    assert_close_run(pipe, loop, batches(3, 12))
    expected = loop.model.eval()(next(batches(1, 6))[0])
    torch.testing.assert_close(pipe(next(batches(1, 6))[0]), expected, rtol=1e-5, atol=1e-6)
    pipe.close()


def test_deferred_layers_move() -> None:
    loop = Whole(deep(), adamw, cross_entropy, 4)
    pipe = rp.Pipeline(deep(), LocalCluster(2), loss=cross_entropy, optimizer=adamw, chunks=4, batch_norm="deferred")
    for name in ("interleaved", "1f1b", "zb-v"):
        assert_close_run(pipe, loop, batches(2, 12))
        pipe.schedule = name
    assert_close_run(pipe, loop, batches(2, 12))


def deep() -> nn.Sequential:
    return nn.Sequential(*model()[:3], nn.BatchNorm1d(16), *model()[3:])


@pytest.mark.parametrize("checkpoint", ["never", "always"])
def test_by_default_every_micro_batch_counts_as_in_a_plain_loop(checkpoint: str) -> None:
    pipe = pipeline(LocalCluster(3), checkpoint=checkpoint)
    assert_same_run(pipe, Natural(model(), sgd, cross_entropy, 3), batches(4, 11))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype: torch.dtype) -> None:
    """An overflow that the loss scale handles skips the update alone: statistics move, as with GradScaler."""

    for mode, make in (("deferred", Whole), ("micro_batch", Natural)):
        pipe = pipeline(LocalCluster(3), autocast=dtype, batch_norm=mode)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**19) if dtype is torch.float16 else None
        if pipe.scaler is not None and scaler is not None:
            pipe.scaler.load_state_dict(scaler.state_dict())
        loop = make(model(), sgd, cross_entropy, 3, autocast=dtype, scaler=scaler)
        assert_close_run(pipe, loop, batches(5, 11))
        if pipe.scaler is not None:
            assert pipe.scaler.get_scale() < 2.0**19


# --- steps that fail ---


def fragile(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The last micro-batch fails, when the others have been through."""
    if target[-1] == 9:
        raise RuntimeError("no")
    return cross_entropy(output, target)


@pytest.mark.parametrize("where", ["local", "rpc"])
@pytest.mark.parametrize("mode", ["micro_batch", "deferred"])
def test_a_failed_step_leaves_buffers_as_they_were(mode: str, where: str, request: pytest.FixtureRequest) -> None:
    cluster = request.getfixturevalue("cluster") if where == "rpc" else LocalCluster(4)
    pipe = pipeline(cluster, loss=fragile, batch_norm=mode)
    loop = (Natural if mode == "micro_batch" else Whole)(model(), sgd, cross_entropy, 3)
    for inputs, targets in batches(3, 11):
        before = pipe.state_dict()
        bad = targets.clone()
        bad[-1] = 9
        for _ in range(2):
            with pytest.raises(rp.StageError, match="no"):
                pipe.train_step(inputs, bad)
            assert_state(pipe, before)
        assert_close_run(pipe, loop, iter([(inputs, targets)]))
    pipe.close()


def assert_state(pipe: rp.Pipeline, expected: dict[str, torch.Tensor]) -> None:
    for name, value in pipe.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_an_update_that_fails_or_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline(LocalCluster(3))
    first, second = batches(2, 11)
    pipe.train_step(*first)
    before = pipe.state_dict()
    apply = LocalOptimizer.apply

    def fail(*_: Any) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr(LocalOptimizer, "apply", fail)
    with pytest.raises(rp.StageError, match="disk full"):
        pipe.train_step(*second)
    monkeypatch.setattr(LocalOptimizer, "apply", apply)
    assert_state(pipe, before)
    with pytest.raises(ZeroDivisionError), pipe.step() as step:  # noqa: PT012
        step.forward_backward(*second)
        _ = 1 / 0
    assert_state(pipe, before)
    loop = Natural(model(), sgd, cross_entropy, 3)
    loop.train_step(*first)
    assert_same_run(pipe, loop, iter([second]))


@pytest.mark.parametrize("mode", ["micro_batch", "deferred"])
def test_statistics_of_a_batch_whose_loss_is_not_finite_are_dropped(mode: str) -> None:
    pipe = pipeline(LocalCluster(3), batch_norm=mode)
    first, second = batches(2, 11)
    pipe.train_step(*first)
    before = pipe.state_dict()
    second[0][3, 2] = math.nan
    result = pipe.train_step(*second)
    assert math.isnan(result.loss)
    assert not result.applied
    assert_state(pipe, before)
    assert pipe.train_step(*first).applied


class Counter(nn.Module):
    """Puts another tensor in its buffer's place."""

    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = torch.cat([self.seen, x.detach().sum().reshape(1)])
        return x


def test_buffers_that_a_forward_replaces_come_back() -> None:
    pipe = rp.Pipeline([nn.Linear(12, 4), Counter()], LocalCluster(2), loss=fragile, optimizer=sgd, chunks=2)
    inputs, targets = next(batches(1))
    pipe.train_step(inputs, targets)
    before = pipe.state_dict()
    assert before["1.seen"].shape == (3,)
    bad = targets.clone()
    bad[-1] = 9
    with pytest.raises(rp.StageError):
        pipe.train_step(inputs, bad)
    assert_state(pipe, before)
    assert_same_weights(pipe, _with(before))


def _with(state: dict[str, torch.Tensor]) -> nn.Module:
    made = nn.Sequential(nn.Linear(12, 4), Counter())
    made[1].seen = torch.zeros(3)
    made.load_state_dict(state)
    return made
