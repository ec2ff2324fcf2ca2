"""Deaths in the midst of a call: what comes out is what came out without, once; or a WorkerLost that says why not."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.driver.driver import Driver
from support.local_cluster import LocalCluster
from support.models import adamw, batches, cross_entropy, mlp, sgd, summed
from support.oracle import Oracle, assert_same_weights
from support.replacement import kill

X, Y = next(batches(1, 24))
BAD = X.clone()
BAD[0, 0] = 1e9


class Deadly(nn.Module):
    """Kills its process where the input is large."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool(x.abs().max() > 1e6):
            os.kill(os.getpid(), signal.SIGKILL)
        return x


def deadly(cluster: Any, **options: Any) -> rp.Pipeline:
    given: dict[str, Any] = {"loss": cross_entropy, "optimizer": adamw, "chunks": 2} | options
    return rp.Pipeline([nn.Sequential(Deadly(), *part) for part in halves()], cluster, **given)


def halves() -> list[nn.Sequential]:
    layers = list(mlp(dropout=0.0))
    return [nn.Sequential(*layers[:4]), nn.Sequential(*layers[4:])]


def state(pipe: rp.Pipeline) -> list[Any]:
    return [value.tolist() for value in pipe.state_dict().values()]


def losses(pipe: rp.Pipeline, count: int = 3) -> list[float]:
    return [pipe.train_step(*batch).loss for batch in batches(count, 24)]


# --- tries ---


@pytest.mark.parametrize(("heal", "tries"), [(True, 4), (1, 2)])
def test_a_call_that_kills_its_worker_each_time_is_given_up(heal: bool | int, tries: int) -> None:
    with rp.launch(workers=2, threads=1, timeout=20.0, heal=heal) as cluster:
        pipe, twin, seen = deadly(cluster), deadly(LocalCluster(2)), list[int]()
        pipe.on_step(lambda result: seen.append(result.step))
        assert losses(pipe) == losses(twin)
        calls: list[Callable[[], Any]] = [
            lambda: pipe.train_step(BAD, Y),
            lambda: list(pipe.train([(X, Y), (BAD, Y), (X, Y)], ahead=1)),
            lambda: pipe.evaluate([(X, Y), (BAD, Y)]),
            lambda: pipe(BAD),
            lambda: pipe.stages[1].call(shrink_and_die),
        ]
        for number, call in enumerate(calls):
            before = len(cluster.events)
            with pytest.raises(rp.WorkerLost) as caught:
                call()
            story = str(caught.value)
            assert f"in each of {tries} tries of one call" in story
            assert f"(heal={tries - 1})" in story
            assert [f"\n{index}. " in story for index in range(1, tries + 2)] == [*[True] * tries, False]
            died = [event for event in cluster.events[before:] if event.kind == "died"]
            # A step that runs ahead, or the next batch, may also take its worker from the one before, once.
            assert tries <= len(died) <= tries + (number in (1, 2))
            assert all(f":{event.pid}) was killed by SIGKILL" in story for event in died[-tries:])
            if number == 1:
                twin.train_step(X, Y)
            assert state(pipe) == state(twin)
            assert pipe.trained == twin.trained
            assert losses(pipe) == losses(twin)
        assert seen == list(range(pipe.trained))


def shrink_and_die(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_call_has_changed_on_replicas_is_undone_if_it_is_given_up(cluster: rp.Cluster) -> None:
    pipe, twin = (deadly(one, replicas=2) for one in (cluster, LocalCluster(4)))
    assert losses(pipe) == losses(twin)
    victim = pipe.stages[1].workers[1]
    with pytest.raises(rp.WorkerLost, match="in each of 4 tries"):
        pipe.stages[1].call(partial(shrink_and_die_on, victim_name=victim))
    assert losses(pipe) == losses(twin)
    assert state(pipe) == state(twin)
    assert len({str(pipe.stages[1].call(weights)) for _ in range(2)}) == 1
    pipe.close()


def shrink_and_die_on(module: nn.Module, victim_name: str) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.5)
    if torch.distributed.rpc.get_worker_info().name.startswith(victim_name):
        os.kill(os.getpid(), signal.SIGKILL)


def weights(module: nn.Module) -> list[Any]:
    return [parameter.tolist() for parameter in module.parameters()]


def dying(*_: Any) -> nn.Module:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_a_pipeline_that_kills_its_workers_is_given_up_and_another_can_be_made(cluster: rp.Cluster) -> None:
    layers = [*mlp()[:7], rp.LayerSpec(dying)]
    with pytest.raises(rp.WorkerLost, match=r"(?s)in each of 4 tries.*There is no pipeline"):
        rp.Pipeline(layers, cluster, loss=cross_entropy, optimizer=sgd, chunks=2, balance=[2] * 4)
    pipe = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=sgd, chunks=2)
    oracle = Oracle(mlp(), sgd, cross_entropy, 2)
    assert losses(pipe) == [oracle.train_step(*batch) for batch in batches(3, 24)]
    pipe.close()


# --- several ---


def test_all_at_once(cluster: rp.Cluster) -> None:
    pipe, twin = (rp.Pipeline(mlp(), one, loss=cross_entropy, optimizer=adamw) for one in (cluster, LocalCluster(4)))
    assert losses(pipe) == losses(twin)
    for worker in cluster.workers:
        os.kill(worker.pid, signal.SIGKILL)
    assert losses(pipe) == losses(twin)
    assert_same_weights(pipe, twin_model(twin))
    pipe.close()


def twin_model(twin: rp.Pipeline) -> nn.Sequential:
    model = mlp()
    model.load_state_dict(twin.state_dict())
    return model


@pytest.mark.parametrize("whom", ["the successor", "another"])
def test_a_death_while_another_is_healed(cluster: rp.Cluster, whom: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, twin = (rp.Pipeline(mlp(), one, loss=cross_entropy, optimizer=adamw) for one in (cluster, LocalCluster(4)))
    assert losses(pipe) == losses(twin)
    first, left, revive = cluster.workers, [3], Driver.revive

    def reviving(self: Driver, worker: str, path: str) -> Any:
        reply = revive(self, worker, path)
        if left[0]:
            left[0] -= 1
            names = {worker} if whom == "the successor" else {"worker0", "worker3"} - {worker}
            for one in cluster.workers:
                if one.name in names:
                    os.kill(one.pid, signal.SIGKILL)
        return reply

    monkeypatch.setattr(Driver, "revive", reviving)
    os.kill(first[1].pid, signal.SIGKILL)
    assert losses(pipe) == losses(twin)
    assert left == [0]
    assert state(pipe) == state(twin)
    pipe.close()


# --- in the midst of an update ---


class DyingAdamW(torch.optim.AdamW):
    """Dies once it has updated half of its parameters, where it is armed."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        whole = group["params"]
        half = (len(whole) + 1) // 2
        group["params"] = whole[:half]
        super().step()
        fault = os.environ.pop("RPCPIPE_DYING", "")
        if fault == "now":
            os.kill(os.getpid(), signal.SIGKILL)
        group["params"] = whole[half:]
        super().step()
        group["params"] = whole


def dying_adamw(params: Any) -> torch.optim.Optimizer:
    return DyingAdamW(params, lr=1e-2)


def arm(module: nn.Module) -> None:
    os.environ["RPCPIPE_DYING"] = "now"


def tied() -> list[rp.LayerSpec]:
    inner = [rp.LayerSpec(nn.Linear, 12, 12) for _ in range(6)]
    return [rp.LayerSpec(nn.Linear, 12, 12, tied="w"), *inner, rp.LayerSpec(nn.Linear, 12, 12, tied="w")]


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batched": {"dispatch": "batched"},
    "replicas": {"replicas": 2},
    "sharded": {"replicas": 2, "shard_optimizer": True},
    "accumulate": {"accumulate": 2},
    "accumulate a count": {"accumulate": 2, "loss": summed},
    "clipped": {"clip_grad_norm": 0.1},
    "float16": {"autocast": torch.float16},
    "batchnorm": {"batch_norm": "deferred"},
    "recomputed": {"checkpoint": "always"},
    "tied": {"model": tied},
    "interleaved": {"schedule": "interleaved", "virtual_stages": 2},
    "zb-v": {"schedule": "zb-v", "virtual_stages": 2},
    "zb-h1": {"schedule": "zb-h1"},
    "gpipe": {"schedule": "gpipe"},
}


def of_kind(kind: str, cluster: Any) -> rp.Pipeline:
    given: dict[str, Any] = {"loss": cross_entropy, "optimizer": dying_adamw, "chunks": 4} | KINDS[kind]
    torch.manual_seed(3)
    layers = given.pop("model", mlp)()
    if "batch_norm" in given:
        layers = [*layers, nn.BatchNorm1d(4)]
    return rp.Pipeline(layers, cluster, **given)


def figures(pipe: rp.Pipeline, data: list[Any]) -> list[Any]:
    return [
        (one.step, one.loss, one.grad_norm, one.applied, one.accumulated)
        for one in [pipe.train_step(*batch) for batch in data]
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_death_amid_an_update_leaves_the_bits(cluster: rp.Cluster, kind: str) -> None:
    pipe, twin = of_kind(kind, cluster), of_kind(kind, LocalCluster(4))
    data = list(batches(2, 24))  # one update where two calls accumulate
    assert repr(figures(pipe, data)) == repr(figures(twin, data))
    for stage in pipe.stages[0], pipe.stages[-1]:
        pids = {worker.name: worker.pid for worker in cluster.workers}
        stage.call(arm)
        assert repr(figures(pipe, data)) == repr(figures(twin, data))
        replaced = {worker.name for worker in cluster.workers if worker.pid != pids[worker.name]}
        assert replaced == set(stage.workers)
    assert state(pipe) == state(twin)
    pipe.close()


# --- once ---


@pytest.mark.parametrize("ahead", [0, 1])
def test_hooks_callbacks_and_schedulers_see_a_step_once(cluster: rp.Cluster, ahead: int) -> None:
    ends = []
    for one in cluster, LocalCluster(4):
        pipe, seen = of_kind("plain", one), list[Any]()
        scheduler = torch.optim.lr_scheduler.StepLR(pipe.optimizer, 2, 0.5)

        def before(optimizer: Any, *_: Any, seen: list[Any] = seen) -> None:
            optimizer.param_groups[0]["lr"] *= 0.9
            seen.append("before")

        pipe.optimizer.register_step_pre_hook(before)
        pipe.optimizer.register_step_post_hook(lambda *_, seen=seen: seen.append("after"))
        pipe.on_step(lambda result, seen=seen: seen.append((result.step, result.loss, result.lr)))
        pipe.train_step(X, Y)
        if one is cluster:
            pipe.stages[1].call(arm)
        data = list(batches(4, 48))
        for result in (
            map(lambda batch, pipe=pipe: pipe.train_step(*batch), data)
            if ahead is None
            else pipe.train(data, ahead=ahead)
        ):
            seen.append(result.step)
            scheduler.step()
        seen += [scheduler.last_epoch, scheduler.get_last_lr(), pipe.trained, state(pipe)]
        ends.append(seen)
        pipe.close()
    assert ends[0] == ends[1]
    assert ends[0].count("before") == ends[0].count("after") == 5


# --- by hand ---


@pytest.fixture
def two(cluster: rp.Cluster) -> Iterator[tuple[rp.Pipeline, rp.Pipeline]]:
    pipes = [rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=adamw) for _ in range(2)]
    yield pipes[0], pipes[1]
    for pipe in pipes:
        pipe.close()


@pytest.mark.parametrize("when", ["before the batch", "before the update"])
def test_a_step_by_hand_is_lost_if_another_pipeline_heals_meanwhile(
    cluster: rp.Cluster, two: tuple[rp.Pipeline, rp.Pipeline], when: str
) -> None:
    pipe, other = two
    twin, others_twin = (rp.Pipeline(mlp(), LocalCluster(4), loss=cross_entropy, optimizer=adamw) for _ in range(2))
    assert losses(pipe) == losses(twin)
    words = "been replaced since this step began.*open another step"
    with pytest.raises(rp.WorkerLost, match=words), pipe.step() as s:  # noqa: PT012
        if when == "before the update":
            s.forward_backward(X, Y)
        kill(cluster, 2)
        assert losses(other) == losses(others_twin)
        if when == "before the batch":
            s.forward_backward(X, Y)
        s.optimize()
    assert pipe.trained == 3
    assert losses(pipe) == losses(twin)
    assert state(pipe) == state(twin)
    assert state(other) == state(others_twin)


def test_a_step_by_hand_counts_if_another_pipeline_heals_after_its_update(
    cluster: rp.Cluster, two: tuple[rp.Pipeline, rp.Pipeline]
) -> None:
    pipe, other = two
    twin = rp.Pipeline(mlp(), LocalCluster(4), loss=cross_entropy, optimizer=adamw)
    with pipe.step() as s:
        s.forward_backward(X, Y)
        s.optimize()
        kill(cluster, 0)
        losses(other)
    twin.train_step(X, Y)
    assert pipe.trained == 1
    assert losses(pipe) == losses(twin)
    assert state(pipe) == state(twin)


def test_predictions_go_on_if_another_pipeline_heals_meanwhile(
    cluster: rp.Cluster, two: tuple[rp.Pipeline, rp.Pipeline]
) -> None:
    pipe, other = two
    data = [x for x, _ in batches(12, 24)]
    expected = [output.tolist() for output in pipe.predict(data)]
    found = []
    for number, output in enumerate(pipe.predict(data)):
        found.append(output.tolist())
        if number in (1, 4):
            kill(cluster, number - 1)
            losses(other)
    assert found == expected
