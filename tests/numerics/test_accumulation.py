"""Several calls of train_step make one update: the bits of a plain loop that accumulates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.stage.optimizer import LocalOptimizer
from rpcpipe.stage.progress import Progress
from support.local_cluster import LocalCluster
from support.models import adamw, batches, cross_entropy, mlp, sgd, summed
from support.oracle import Natural, assert_same_run, assert_same_weights


def pipeline(cluster: Any, calls: int, **changed: Any) -> rp.Pipeline:
    arguments = {"loss": cross_entropy, "optimizer": adamw, "chunks": 3} | changed
    return rp.Pipeline(mlp(), cluster, accumulate=calls, **arguments)


def natural(calls: int, **changed: Any) -> Natural:
    arguments = {"optimizer": adamw, "loss": cross_entropy, "chunks": 3} | changed
    return Natural(mlp(), accumulate=calls, **arguments)


def test_progress() -> None:
    progress = Progress(3)
    for step, done in ((5, 1), (7, 2), (8, 0)):
        assert progress.is_last == (done == 0)
        progress = progress.later(step, 4.0)
        assert progress.done == done
    assert progress == Progress(3)
    assert Progress(3, 1, 5, 4.0).counted(2.0) == 6.0
    with pytest.raises(rp.ModelError, match="same form in all"):
        Progress(3, 1, 5, 4.0).counted(None)


@pytest.mark.parametrize("loss", [cross_entropy, summed])
@pytest.mark.parametrize("dispatch", ["rref", "batched"])
def test_through_rpc(cluster: rp.Cluster, dispatch: str, loss: Any) -> None:
    """Uneven micro-batches, dropout, clipping; evaluations and a trace in between."""
    pipe = pipeline(cluster, 3, loss=loss, dispatch=dispatch, clip_grad_norm=0.05)
    loop = natural(3, loss=loss, clip=0.05)
    results = []
    for number, batch in enumerate(batches(7)):
        results += assert_same_run(pipe, loop, iter([batch]))
        pipe.evaluate([batch])
        if number == 3:
            with pipe.trace() as timeline:
                results += assert_same_run(pipe, loop, iter([batch]))
            assert len(timeline.spans) == 2 * 3 * 4  # no update among them
    assert [result.accumulated for result in results] == [1, 2, 0] * 2 + [1, 2]
    assert [result.step for result in results] == list(range(8))
    assert "2 accumulated" in repr(results[1])
    pipe.close()


@pytest.mark.parametrize("schedule", ["gpipe", "zb-v", "dualpipe-v", "interleaved"])
def test_other_schedules_and_recomputation(schedule: str) -> None:
    virtual = rp.schedules.fewest_virtual_stages(schedule)
    pipe = pipeline(LocalCluster(3), 2, schedule=schedule, virtual_stages=virtual, chunks=6, checkpoint="always")
    assert_same_run(pipe, natural(2, chunks=6), batches(4, 16))


def test_with_a_loss_scale_that_overflows_within() -> None:
    """Gradients stay scaled until the update; one overflow skips it, as GradScaler does."""

    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)

    pipe = pipeline(LocalCluster(3), 2, autocast=torch.float16)
    assert pipe.scaler is not None
    pipe.scaler.load_state_dict(scaler().state_dict())
    loop = natural(2, autocast=torch.float16, scaler=scaler())
    results = assert_same_run(pipe, loop, batches(16))
    assert pipe.scaler.state_dict() == loop.scaler.state_dict()
    updates = [result.applied for result in results if not result.accumulated]
    assert True in updates
    assert False in updates


def fragile(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The last micro-batch of a batch whose last target is 9 fails, when earlier ones have gone backward."""
    if target[-1] == 9:
        raise RuntimeError("no")
    return cross_entropy(output, target)


@pytest.mark.parametrize("where", ["local", "rpc"])
def test_a_failed_call_drops_its_own_contribution_alone(where: str, request: pytest.FixtureRequest) -> None:
    cluster = request.getfixturevalue("cluster") if where == "rpc" else LocalCluster(4)
    pipe, loop = pipeline(cluster, 3, loss=fragile), natural(3)
    for inputs, targets in batches(6):
        before = pipe.state_dict()
        for again in range(2):  # twice in a row
            bad = targets.clone()
            bad[-1] = 9
            with pytest.raises(rp.StageError, match="no"):
                pipe.train_step(inputs + again, bad)
        assert all(torch.equal(before[name], value) for name, value in pipe.state_dict().items())
        assert_same_run(pipe, loop, iter([(inputs, targets)]))
    pipe.close()


def test_an_update_that_fails_may_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some workers have handed over and updated; all go back to what the calls before had accumulated."""
    pipe, loop = pipeline(LocalCluster(3), 2), natural(2)
    apply, left = LocalOptimizer.apply, [0]

    def fail_once(self: LocalOptimizer, *args: Any) -> None:
        left[0] -= 1
        if left[0] == 1:
            raise RuntimeError("disk full")
        apply(self, *args)

    monkeypatch.setattr(LocalOptimizer, "apply", fail_once)
    for index, batch in enumerate(batches(6)):
        if index % 2:
            left[0] = 3
            with pytest.raises(rp.StageError, match="disk full"):
                pipe.train_step(*batch)
        assert_same_run(pipe, loop, iter([batch]))


def test_the_schedule_may_change_in_between(cluster: rp.Cluster) -> None:
    """What was accumulated moves along, also after a call that failed."""
    pipe, loop = pipeline(cluster, 3, chunks=8), natural(3, chunks=8)
    names = ["gpipe", "interleaved", "zb-v", "zb-h1", "dualpipe-v", "1f1b", "naive"]
    for batch, name in zip(batches(len(names), 16), names, strict=True):
        assert_same_run(pipe, loop, iter([batch]))
        with pytest.raises(rp.StageError):
            pipe.train_step(batch[0], batch[1] + 100)
        pipe.schedule = name
    pipe.close()


def test_a_gradient_that_is_not_finite_refuses_the_whole_update() -> None:
    pipe, before = pipeline(LocalCluster(3), 2, loss=lambda o, y: cross_entropy(o, y) / (y.max() != 3)), None
    calm = [(x, y.clamp(max=2)) for x, y in batches(4)]
    wild = [(x, torch.full_like(y, 3)) for x, y in batches(4)]
    for first, second in ((wild[0], calm[0]), (calm[1], wild[1])):
        before = pipe.state_dict()
        pipe.train_step(*first)
        result = pipe.train_step(*second)
        assert not result.applied
        assert result.accumulated == 0
        assert all(torch.equal(before[name], value) for name, value in pipe.state_dict().items())
    pipe.train_step(*calm[2])
    assert pipe.train_step(*calm[3]).applied
    stopping = pipeline(LocalCluster(3), 2, loss=lambda o, y: cross_entropy(o, y) / (y.max() != 3), nonfinite="stop")
    loop = natural(2)
    assert_same_run(stopping, loop, iter(calm[:1]))
    with pytest.raises(rp.NonFiniteError):
        stopping.train_step(*wild[0])
    assert_same_run(stopping, loop, iter(calm[1:]))  # that call alone was dropped


def test_by_hand_and_forgotten() -> None:
    pipe, loop = pipeline(LocalCluster(3), 2), natural(2)
    data = list(batches(6))
    pipe.train_step(*data[5])
    pipe.optimizer.zero_grad()
    with pipe.step() as step:
        step.forward_backward(*data[5])
        pipe.optimizer.zero_grad()
    loop.step = 2  # the forgotten calls have drawn their random numbers
    for batch in data[:4]:
        with pipe.step() as step:
            assert step.forward_backward(*batch) == loop.train_step(*batch)
            step.optimize()
        assert step.result().applied == loop.updated
    assert_same_weights(pipe, loop.model)


def test_one_call_is_no_accumulation_and_refusals() -> None:
    assert_same_run(pipeline(LocalCluster(2), 1), natural(1))
    with pytest.raises(ValueError, match="accumulate must be at least 1, not 0"):
        pipeline(LocalCluster(2), 0)
    with pytest.raises(rp.ScheduleError, match="accumulate=2 does not fit"):
        pipeline(LocalCluster(2), 2, schedule="pipedream")
    pipe = pipeline(LocalCluster(2), 2)
    with pytest.raises(rp.ScheduleError, match="larger batches and more chunks"):
        pipe.schedule = "pipedream-2bw"
    pipe = pipeline(LocalCluster(2), 1, schedule="pipedream", chunks=1)
    with pytest.raises(rp.ScheduleError, match="accumulate=2"):
        pipe.accumulate = 2
    assert pipe.train_step(*next(batches(1))).applied


@pytest.mark.parametrize("shard", [False, True])
def test_replicas_exchange_at_the_update_alone(shard: bool) -> None:
    """Under float16 with an overflow, and a failed call before each."""
    pipe = rp.Pipeline(
        mlp(dropout=0.0), LocalCluster(4), loss=cross_entropy, optimizer=sgd, chunks=2, replicas=2,
        shard_optimizer=shard, accumulate=2, autocast=torch.float16, clip_grad_norm=0.5,
    )  # fmt: skip
    loop = Natural(mlp(dropout=0.0), sgd, cross_entropy, 4, accumulate=2, autocast=torch.float16, clip=0.5,
                   scaler=torch.amp.GradScaler("cpu", init_scale=2.0**20))  # fmt: skip
    assert pipe.scaler is not None
    pipe.scaler.load_state_dict(loop.scaler.state_dict())
    applied = set()
    for inputs, targets in batches(12, 16):
        with pytest.raises(rp.StageError):
            pipe.train_step(inputs, targets + 100)
        result = pipe.train_step(inputs, targets)
        assert result.loss == pytest.approx(loop.train_step(inputs, targets), rel=1e-3)
        assert result.applied == loop.updated
        applied |= set() if result.accumulated else {result.applied}
    assert applied == {True, False}
    assert pipe.scaler.state_dict() == loop.scaler.state_dict()
    for name, value in loop.model.state_dict().items():
        torch.testing.assert_close(pipe.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_frozen_layers_have_nothing_to_keep() -> None:
    def model() -> nn.Sequential:
        made = mlp(6)
        made[0].requires_grad_(False)
        made[3].requires_grad_(False)
        return made

    pipe = rp.Pipeline(model(), LocalCluster(3), loss=cross_entropy, optimizer=sgd, chunks=2, accumulate=2,
                       balance=[1, 2, 3])  # fmt: skip
    loop = Natural(model(), sgd, cross_entropy, 2, accumulate=2)
    assert_same_run(pipe, loop)
    assert_same_weights(pipe, loop.model)
