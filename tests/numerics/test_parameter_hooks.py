"""Hooks on parameters run as in a plain loop: once per micro-batch, on the micro-batch's gradient."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.schedules import weight_versions
from rpcpipe.stage import gradients
from support.local_cluster import LocalCluster
from support.models import adamw, cross_entropy, sgd
from support.oracle import Natural, Oracle, Versioned, assert_same_run, assert_same_weights, train

WIDTH = 12


def squared(grad: torch.Tensor) -> torch.Tensor:
    """No linear function, so that a sum is not the sum of what it makes of the parts."""
    return grad * grad.abs()


def clipped_after(parameter: torch.Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.clamp_(-0.01, 0.01)


class Hooked(nn.Sequential):
    """``hook``: "before" the gradient is accumulated, "after", "both", or "none"."""

    def __init__(self, hook: str, out: int = WIDTH) -> None:
        super().__init__(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1), nn.GELU(), nn.Linear(WIDTH, out))
        for parameter in self.parameters():
            if hook in ("before", "both"):
                parameter.register_hook(squared)
            if hook in ("after", "both"):
                parameter.register_post_accumulate_grad_hook(clipped_after)


class Twice(nn.Module):
    """Uses one weight twice, so that autograd sums its gradients before the hook."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        self.inner = Hooked(hook)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(self.inner(x))


def layers(hook: str) -> list[Any]:
    return [
        rp.LayerSpec(Hooked, hook), rp.LayerSpec(Twice, hook), rp.LayerSpec(Hooked, "none"),
        rp.LayerSpec(Hooked, hook, 4),
    ]  # fmt: skip


def oracle(hook: str) -> nn.Sequential:
    return nn.Sequential(*rp.layers.Sequential(layers(hook)))


def data(count: int = 3) -> Any:
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        yield torch.randn(8, WIDTH, generator=generator), torch.randint(0, 4, (8,), generator=generator)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"clip_grad_norm": 0.05},
    "recomputed": {"checkpoint": "always"},
    "accumulated": {"accumulate": 2},
    "float16": {"autocast": torch.float16},
    "one stage": {"balance": [4]},
}


@pytest.mark.parametrize("hook", ["before", "after", "both"])
@pytest.mark.parametrize("case", OPTIONS)
def test_hooks_run_once_per_micro_batch(case: str, hook: str) -> None:
    options = dict(OPTIONS[case])
    pipe = rp.Pipeline(layers(hook), LocalCluster(2), loss=cross_entropy, optimizer=adamw, chunks=4, **options)  # type: ignore[arg-type]
    options.pop("balance", None)
    options.pop("checkpoint", None)
    clip = options.pop("clip_grad_norm", None)
    scaler = torch.amp.GradScaler("cpu") if "autocast" in options else None
    assert_same_run(pipe, Natural(oracle(hook), adamw, cross_entropy, 4, clip=clip, scaler=scaler, **options), data())


@pytest.mark.parametrize("hook", ["before", "after", "both"])
@pytest.mark.parametrize("schedule", [name for name in rp.schedules.names() if name not in weight_versions.POLICIES])
def test_under_every_synchronous_schedule(schedule: str, hook: str) -> None:
    pipe = rp.Pipeline(
        layers(hook), LocalCluster(2), loss=cross_entropy, optimizer=sgd, chunks=4, schedule=schedule,
        virtual_stages=2 if schedule in ("interleaved", "looped-bfs") else 1,
    )  # type: ignore[arg-type]  # fmt: skip
    assert_same_run(pipe, Natural(oracle(hook), sgd, cross_entropy, 4), data())


@pytest.mark.parametrize("shard", [False, True])
def test_in_every_replica_before_the_sum(shard: bool) -> None:
    pipe = rp.Pipeline(
        layers("both"), LocalCluster(4), loss=cross_entropy, optimizer=sgd, chunks=2, replicas=2, shard_optimizer=shard
    )  # type: ignore[arg-type]
    loop = Oracle(oracle("both"), sgd, cross_entropy, 2, replicas=2)
    for batch in data():
        assert pipe.train_step(*batch).loss == loop.train_step(*batch)
    assert_same_weights(pipe, loop.model)


@pytest.mark.parametrize("hook", ["before", "both"])
def test_through_rpc(cluster: rp.Cluster, hook: str) -> None:
    pipe = rp.Pipeline(layers(hook), cluster, loss=cross_entropy, optimizer=sgd, chunks=4, balance=[2, 2])
    assert_same_run(pipe, Natural(oracle(hook), sgd, cross_entropy, 4), data())
    pipe.close()


@pytest.mark.parametrize("policy", [policy.name for policy in weight_versions.POLICIES["pipedream"][:2]])
def test_streams_run_them_on_the_version_that_was_used(policy: str) -> None:
    pipe = rp.Pipeline(
        layers("before"), LocalCluster(2), loss=cross_entropy, optimizer=sgd, chunks=2, schedule="pipedream",
        weights=policy, balance=[2, 2],
    )  # type: ignore[arg-type]  # fmt: skip
    model = oracle("none")
    versioned = HookedVersions(model, sgd, cross_entropy, [2, 2])
    results = [result.loss for result in pipe.train(data())]
    assert results == train(versioned, data(), policy, 2, 2)
    assert_same_weights(pipe, model)


class HookedVersions(Versioned):
    """Applies ``squared`` to the gradients of the layers that have it, one micro-batch at a time."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        for name, parameter in self.model.named_parameters():
            if not name.startswith("2."):
                self._hook(parameter)

    def _hook(self, parameter: nn.Parameter) -> None:
        optimizer = self.optimizer

        def before(*_: Any) -> None:
            if parameter.grad is not None:
                parameter.grad = squared(parameter.grad)

        optimizer.register_step_pre_hook(before)


def test_streams_refuse_hooks_after_the_accumulation_by_name() -> None:
    pipe = rp.Pipeline(
        layers("after"), LocalCluster(2), loss=cross_entropy, optimizer=sgd, chunks=2, schedule="pipedream"
    )  # type: ignore[arg-type]
    before = pipe.state_dict()
    with pytest.raises(rp.ScheduleError, match=r"'[03]\.0\.weight' has a hook of register_post_accumulate_grad_hook"):
        list(pipe.train(data()))
    assert all(torch.equal(value, before[name]) for name, value in pipe.state_dict().items())


class HookedEmbedding(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH, bias=False)
        self.weight.register_hook(squared)


def tied() -> list[Any]:
    return [
        rp.LayerSpec(HookedEmbedding, tied="w"), rp.LayerSpec(nn.GELU),
        rp.LayerSpec(nn.Linear, WIDTH, WIDTH, bias=False, tied="w"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [{"balance": [1, 2]}, {"balance": [1, 1, 1]}, {"balance": [3], "checkpoint": 0.5}],
    ids=["workers", "three", "segments"],
)
def test_hooks_on_a_weight_that_is_tied_across_backwards_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(rp.ModelError, match=r"0\.weight and 2\.weight are one weight, whose hooks would run on parts"):
        rp.Pipeline(tied(), LocalCluster(3), loss=cross_entropy, optimizer=sgd, **options)  # type: ignore[arg-type]


def test_hooks_that_a_call_registers_on_such_a_weight_are_removed_again() -> None:
    plain = [rp.LayerSpec(nn.Linear, WIDTH, WIDTH, bias=False, tied="w") for _ in range(2)]
    pipes = [
        rp.Pipeline(plain, LocalCluster(2), loss=cross_entropy, optimizer=sgd, chunks=2, balance=[1, 1])  # type: ignore[arg-type]
        for _ in range(2)
    ]
    for hook in (nn.Parameter.register_hook, nn.Parameter.register_post_accumulate_grad_hook):
        with pytest.raises(rp.ModelError, match="are one weight, whose hooks would run on parts"):
            pipes[0].stages[1].call(lambda m, hook=hook: hook(m[0].weight, lambda *_: None) and None)
    for batch in data():
        assert pipes[0].train_step(*batch).loss == pipes[1].train_step(*batch).loss


def test_hooks_on_a_weight_that_is_tied_within_a_stage_run_on_the_sum() -> None:
    for schedule in ("1f1b", "zb-h1"):
        pipe = rp.Pipeline(
            tied(), LocalCluster(1), loss=cross_entropy, optimizer=sgd, chunks=2, balance=[3], schedule=schedule
        )  # type: ignore[arg-type]
        loop = Oracle(rp.layers.Sequential(tied()), sgd, cross_entropy, 2)  # type: ignore[arg-type]
        for batch in data():
            assert pipe.train_step(*batch).loss == loop.train_step(*batch)
        assert_same_weights(pipe, loop.model)


def test_hooks_are_back_when_filing_the_gradients_fails() -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.register_hook(squared)
    parameter.register_post_accumulate_grad_hook(clipped_after)
    before = gradients.hooks_of(parameter)
    with contextlib.suppress(KeyboardInterrupt), gradients.hooks_lifted([parameter]):
        assert not gradients.has_hooks(parameter)
        raise KeyboardInterrupt
    assert gradients.hooks_of(parameter) == before
    (parameter * 0.5).sum().backward()
    assert parameter.grad is not None
    assert torch.equal(parameter.grad, torch.full((2,), 0.01))
