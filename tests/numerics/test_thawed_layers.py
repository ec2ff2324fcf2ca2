"""A call may freeze parameters; it may not make any trainable that no optimizer has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from support.local_cluster import LocalCluster
from support.models import batches, cross_entropy
from support.oracle import Natural, assert_same_run, assert_same_weights

WIDTH = 12
# The stages' workers in the opposite order.
REVERSED = "\n".join(reversed(rp.schedules.get("1f1b", 3, 2).to_csv().splitlines()))


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1)


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)


def layers() -> list[nn.Module]:
    torch.manual_seed(4)
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), nn.Linear(WIDTH, WIDTH).requires_grad_(False),
            nn.Linear(WIDTH, 4)]  # fmt: skip


def replace(module: nn.Module) -> None:
    module[0][0].weight = nn.Parameter(torch.zeros(WIDTH, WIDTH))


def add_parameter(module: nn.Module) -> None:
    module[0].register_parameter("scale", nn.Parameter(torch.ones(())))


def add_module(module: nn.Module) -> None:
    module[0].append(nn.Linear(WIDTH, WIDTH))


def thaw(module: nn.Module) -> None:
    module[1].requires_grad_(True)


def thaw_and_freeze(module: nn.Module) -> None:
    thaw(module)
    module[0].requires_grad_(False)


def thaw_and_fail(module: nn.Module) -> None:
    thaw(module)
    raise RuntimeError("made trainable first")


THAWS: dict[Callable[[nn.Module], None], str] = {
    thaw: "'1.weight' and 1 more trainable",
    thaw_and_freeze: "'1.weight' and 1 more trainable",
    replace: "'0.0.weight' trainable",
    add_parameter: "'0.scale' trainable",
    add_module: "'0.2.weight' and 1 more trainable",
    thaw_and_fail: "made trainable first",
}


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("change", THAWS, ids=lambda change: change.__name__)
def test_what_the_optimizer_does_not_have_stays_frozen(change: Callable[[nn.Module], None], replicas: int) -> None:
    pipe = rp.Pipeline(
        layers(), LocalCluster(2 * replicas), loss=cross_entropy, optimizer=sgd, chunks=2, balance=[2, 1],
        replicas=replicas, clip_grad_norm=0.1,
    )  # type: ignore[arg-type]  # fmt: skip
    loop = Natural(nn.Sequential(*layers()), sgd, cross_entropy, 2 * replicas, clip=0.1)
    pipe.train_step(*next(batches(1, 8)))
    loop.train_step(*next(batches(1, 8)))
    with pytest.raises((rp.ModelError, RuntimeError), match=THAWS[change]) as raised:
        pipe.stages[0].call(change)
    assert isinstance(raised.value, rp.StageError)
    assert "load_state_dict" in str(raised.value) or change is thaw_and_fail
    found = pipe.stages[0].call(lambda m: {name: p.requires_grad for name, p in m.named_parameters()})
    assert found == {name: p.requires_grad for name, p in nn.Sequential(*layers()[:2]).named_parameters()}
    if replicas == 1:
        assert_same_run(pipe, loop, batches(2, 8))


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("make", [sgd, adam])
def test_what_a_call_freezes_does_not_move(make: Any, moved: bool) -> None:
    pipe = rp.Pipeline(layers(), LocalCluster(3), loss=cross_entropy, optimizer=make, chunks=2, balance=[1, 1, 1])  # type: ignore[arg-type]
    loop = Natural(nn.Sequential(*layers()), make, cross_entropy, 2)
    assert_same_run(pipe, loop, batches(2))
    pipe.stages[0].call(lambda m: m.requires_grad_(False) and None)
    loop.model[0].requires_grad_(False)
    loop.trainable = list(loop.model[2].parameters())
    if moved:
        pipe.schedule = rp.Schedule.from_csv(REVERSED)
    frozen = pipe.state_dict()["0.0.weight"]
    assert_same_run(pipe, loop, batches(2))
    assert torch.equal(pipe.state_dict()["0.0.weight"], frozen)
    if not moved:  # the optimizer still has it, as the plain loop's
        pipe.stages[0].call(lambda m: m.requires_grad_(True) and None)
        loop.model[0].requires_grad_(True)
        loop.trainable = [p for p in loop.model.parameters() if p.requires_grad]
        assert_same_run(pipe, loop, batches(2))


def test_a_new_pipeline_trains_what_was_thawed() -> None:
    pipe = rp.Pipeline(layers(), LocalCluster(2), loss=cross_entropy, optimizer=sgd, chunks=2, balance=[2, 1])  # type: ignore[arg-type]
    pipe.train_step(*next(batches(1)))
    model = [layer.requires_grad_(True) for layer in layers()]
    again = rp.Pipeline(model, LocalCluster(2), loss=cross_entropy, optimizer=sgd, chunks=2, balance=[2, 1])  # type: ignore[arg-type]
    again.load_state_dict(pipe.state_dict())
    loop = Natural(nn.Sequential(*model), sgd, cross_entropy, 2)
    loop.model.load_state_dict(pipe.state_dict())
    assert_same_run(again, loop, batches(2))
    assert_same_weights(again, loop.model)
