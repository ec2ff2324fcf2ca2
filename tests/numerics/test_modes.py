"""What the user has put into eval mode stays there, and measuring leaves everything as it was."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from support.local_cluster import LocalCluster
from support.models import adamw, batches, cross_entropy, sgd
from support.oracle import Natural, Oracle, assert_same_run, assert_same_weights

WIDTH = 12


class Block(nn.Sequential):
    def __init__(self, frozen: str = "") -> None:
        super().__init__(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.3), nn.GELU())
        for module in self.modules() if frozen == "all" else [self[1]] if frozen == "norm" else []:
            module.training = False


class Merging(nn.Linear):
    """Does more in ``train`` than set the flag, as layers that merge low-rank weights do."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.merged = 0

    def train(self, mode: bool = True) -> Merging:
        if mode != self.training:
            self.merged += -1 if mode else 1
        super().train(mode)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.merged == (0 if self.training else 1)
        return super().forward(x)


def layers(kind: str) -> list[nn.Module]:
    torch.manual_seed(3)
    found = [Block(), Block("norm" if kind == "norm" else ""), Merging(), Block(), nn.Linear(WIDTH, 4)]
    if kind in ("layer", "specs"):
        found[3].eval()
    if kind == "model":
        nn.Sequential(*found).eval()
    return found


def model_of(kind: str) -> list[Any]:
    if kind == "specs":
        torch.manual_seed(3)
        return [rp.LayerSpec(Block, "all"), rp.LayerSpec(Block, "norm"), rp.LayerSpec(nn.Linear, WIDTH, 4)]
    return layers(kind)


def plain(kind: str) -> nn.Sequential:
    return nn.Sequential(*rp.layers.Sequential(model_of(kind)))


KINDS = ["train", "norm", "layer", "model", "specs"]


@pytest.mark.parametrize("checkpoint", ["never", "always"])
@pytest.mark.parametrize("kind", KINDS)
def test_modes_are_the_users_also_after_evaluations_moves_and_saves(kind: str, checkpoint: str, tmp_path: Path) -> None:
    pipe = rp.Pipeline(
        model_of(kind), LocalCluster(2), loss=cross_entropy, optimizer=sgd, chunks=2, checkpoint=checkpoint,
        balance=[1, len(model_of(kind)) - 1],
    )  # type: ignore[arg-type]  # fmt: skip
    loop = Natural(plain(kind), sgd, cross_entropy, 2)
    between: list[Callable[[], Any]] = [
        lambda: pipe.evaluate(batches(1)),
        lambda: pipe(next(batches(1))[0]),
        lambda: setattr(pipe, "schedule", "zb-h1"),
        lambda: (pipe.save(tmp_path), pipe.evaluate(batches(1)), pipe.load(tmp_path)),
    ]  # fmt: skip
    flags = {name: module.training for name, module in loop.model.named_modules() if name}
    for act in between:
        assert_same_run(pipe, loop, batches(1))
        pipe.evaluate(batches(1))
        act()
        found = [stage.call(lambda m: {n: c.training for n, c in m.named_modules() if n}) for stage in pipe.stages]
        assert {name: flag for stage in found for name, flag in stage.items()} == flags
    if kind != "specs":  # of too few layers
        pipe.schedule = "zb-v"  # type: ignore[assignment]
    assert_same_run(pipe, loop, batches(2))


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_call_sets_modes(evaluated: bool) -> None:
    pipe = rp.Pipeline(layers("train"), LocalCluster(2), loss=cross_entropy, optimizer=sgd, chunks=2, balance=[2, 3])  # type: ignore[arg-type]
    loop = Natural(nn.Sequential(*layers("train")), sgd, cross_entropy, 2)
    for change in (nn.Module.eval, nn.Module.train):
        assert_same_run(pipe, loop, batches(1))
        if evaluated:
            pipe.evaluate(batches(1))
        pipe.stages[0].call(lambda m, change=change: change(m[1]) and None)
        change(loop.model[1])
        if evaluated:
            pipe.evaluate(batches(1))
        assert_same_run(pipe, loop, batches(2))


@pytest.mark.parametrize("replicas", [1, 2])
def test_frozen_norms_stay_where_others_are_deferred(replicas: int) -> None:
    model = layers("norm")
    before = {name: value.clone() for name, value in model[1][1].state_dict().items()}
    pipe = rp.Pipeline(
        model, LocalCluster(2 * replicas), loss=cross_entropy, optimizer=sgd, chunks=2, balance=[2, 3],
        batch_norm="deferred", replicas=replicas,
    )  # type: ignore[arg-type]  # fmt: skip
    loop = Oracle(nn.Sequential(*layers("norm")), sgd, cross_entropy, 2, replicas=replicas)
    for batch in batches(2, 8):
        assert pipe.train_step(*batch).loss == loop.train_step(*batch)
        pipe.evaluate([batch])
    state = pipe.state_dict()
    for name, value in loop.model.state_dict().items():
        if "running" not in name and "tracked" not in name:
            assert torch.equal(state[name], value), name
    assert all(torch.equal(state[f"1.1.{name}"], before[name]) for name in before if name not in ("weight", "bias"))
    assert int(state["0.1.num_batches_tracked"]) == 2


def test_stages_by_hand_have_the_users_modes(cluster: rp.Cluster) -> None:
    pipe = rp.Pipeline(layers("norm"), cluster, loss=cross_entropy, optimizer=adamw, chunks=2, balance=[2, 3])
    pipe.evaluate(batches(1))
    before = pipe.state_dict()
    pipe.stages[0].forward(next(batches(1))[0]).to_here()
    after = pipe.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"0.1.running_mean", "0.1.running_var", "0.1.num_batches_tracked"}
    pipe.close()


# --- measuring ---


class Weighted(nn.Module):
    """A loss with state of its own, and random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return nn.functional.cross_entropy(output + random.random() + torch.rand(()), target)


def inplace() -> list[Any]:
    return [nn.ReLU(inplace=True), *layers("norm")[:-1], rp.LayerSpec(nn.Linear, WIDTH, 4)]


def by_plan(model: Any, x: torch.Tensor, loss: Any) -> Any:
    targets = torch.zeros(len(x), dtype=torch.long)
    return rp.plan(model, x, 2, loss=loss, targets=targets, optimizer=adamw, chunks=[2])


MEASURES: dict[str, Callable[..., Any]] = {
    "time": lambda model, x, loss: rp.balance_by_time(model, 2, x),
    "memory": lambda model, x, loss: rp.balance_by_memory(model, 2, x),
    "plan": by_plan,
    "plan by operations": lambda model, x, loss: rp.plan(model, x, 2, flops=1e12, chunks=[2]),
}  # fmt: skip


@pytest.mark.parametrize("measure", MEASURES)
def test_measuring_leaves_everything_as_it_was(measure: str) -> None:
    model, loss, x = inplace(), Weighted(), torch.randn(8, WIDTH)
    modules = OrderedDict((str(at), layer) for at, layer in enumerate(model) if isinstance(layer, nn.Module))
    for layer in modules.values():
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter)
    tensors = {(k, n): v for k, layer in modules.items() for n, v in layer.state_dict(keep_vars=True).items()}
    before = copy.deepcopy([layer.state_dict() for layer in modules.values()]), x.clone()
    flags = [module.training for layer in modules.values() for module in layer.modules()]
    states = torch.get_rng_state(), random.getstate()
    MEASURES[measure](model, x, loss)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert flags == [module.training for layer in modules.values() for module in layer.modules()]
    torch.testing.assert_close(([layer.state_dict() for layer in modules.values()], x), before, rtol=0, atol=0)
    for (key, name), tensor in tensors.items():
        assert modules[key].state_dict(keep_vars=True)[name] is tensor
        assert not tensor.requires_grad or torch.equal(tensor.grad, torch.ones_like(tensor))
    assert float(loss.calls) == 0


def test_what_is_measured_is_what_will_run() -> None:
    seen: list[bool] = []

    class Spy(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(self.training)
            return super().forward(x)

    rp.balance_by_time(nn.Sequential(Spy(4, 4), Spy(4, 4).eval()), 2, torch.randn(2, 4))
    assert seen == [True] * (len(seen) // 2) + [False] * (len(seen) // 2)


def test_weights_after_measuring_on_a_worker_are_those_of_any_cut(cluster: rp.Cluster) -> None:
    x = torch.randn(2, WIDTH)
    pipe = rp.Pipeline(layers("layer"), cluster, loss=cross_entropy, optimizer=sgd, chunks=2, balance="time", sample=x)
    loop = Natural(nn.Sequential(*layers("layer")), sgd, cross_entropy, 2)
    assert_same_run(pipe, loop, batches(2))
    assert_same_weights(pipe, loop.model)
    pipe.close()
