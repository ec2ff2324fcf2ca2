"""Modules that are no chain of layers, cut by ``rp.split``, train as they do in a plain loop."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.model.microbatch import split as cut
from support.any_models import CASES, Case
from support.local_cluster import LocalCluster
from support.models import sgd
from support.odd_models import ODD
from support.oracle import Oracle, assert_same_weights

ROWS, CHUNKS, STEPS = 11, 4, 3  # micro-batches of 3, 3, 3 and 2 rows


def called(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict) and not isinstance(model, CASES["mixer"].make):  # type: ignore[arg-type]
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, case: Case, inputs: Any, targets: Any) -> float:
    total = 0.0
    for x, y in zip(cut(inputs, CHUNKS), targets.chunk(CHUNKS), strict=True):
        loss = case.loss(called(model, x), y) * (len(y) / len(targets))
        loss.backward()
        total += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    return total


def assert_close(state: dict[str, torch.Tensor], model: nn.Module) -> None:
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.allclose(state[name], value, rtol=1e-6, atol=1e-6), name


@pytest.mark.parametrize("name", [name for name in CASES if name != "dropping"])
def test_trained_beside_the_plain_loop(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(1)
    model = case.make()
    alone = copy.deepcopy(model)
    pipe = rp.Pipeline(
        model, LocalCluster(3), sample=case.inputs(4), loss=case.loss, optimizer=sgd, chunks=CHUNKS,
        schedule="1f1b", checkpoint="except_last",
    )  # fmt: skip
    optimizer = sgd(list(alone.parameters()))
    for _ in range(STEPS):
        inputs, targets = case.inputs(ROWS), case.targets(ROWS)
        loss = pipe.train_step(inputs, targets).loss
        assert loss == pytest.approx(plain_step(alone, optimizer, case, inputs, targets), abs=1e-6)
    assert_close(pipe.state_dict(), alone)
    alone.eval()
    with torch.no_grad():
        wanted = [called(alone, part) for part in cut(inputs, CHUNKS)]
    got = pipe(inputs)
    assert torch.allclose(torch.cat([code(part) for part in wanted]), code(got), atol=1e-5)
    if isinstance(got, dict):
        assert got["kind"] == [part["kind"] for part in wanted]


def code(output: Any) -> torch.Tensor:
    return output["code"] if isinstance(output, dict) else output  # type: ignore[no-any-return]


@pytest.mark.parametrize("cls", ODD, ids=lambda cls: cls.__name__)
def test_forwards_that_a_recorder_might_miss(cls: type[nn.Module]) -> None:
    torch.manual_seed(2)
    model, x, y = cls(), torch.randn(6, 4), torch.randn(6, 4)
    alone, layers = copy.deepcopy(model), rp.split(model, x)
    case = Case(cls, lambda size: x, lambda size: y, nn.functional.mse_loss)
    given: Any = {"loss": case.loss, "optimizer": sgd, "chunks": CHUNKS}
    pipe = rp.Pipeline(layers, LocalCluster(len(layers)), balance=[1] * len(layers), **given)
    optimizer = sgd(list(alone.parameters()))
    for _ in range(2):
        assert pipe.train_step(x, y).loss == pytest.approx(plain_step(alone, optimizer, case, x, y), abs=1e-6)
    assert_close(pipe.state_dict(), alone)


def pipeline(name: str, model: nn.Module, **arguments: Any) -> rp.Pipeline:
    case = CASES[name]
    given = {"sample": case.inputs(4), "loss": case.loss, "optimizer": sgd, "chunks": 3} | arguments
    return rp.Pipeline(model, LocalCluster(2), **given)


def test_random_numbers_are_those_of_the_layers() -> None:
    """Dropout draws by layer, so that a pipeline's bits are those of its layers in one process."""
    case = CASES["dropping"]
    torch.manual_seed(1)
    model = case.make()
    layers = rp.split(model, case.inputs(4))
    alone = Oracle(rp.layers.Sequential(copy.deepcopy(layers)), sgd, case.loss, 3)
    pipe = pipeline("dropping", model)
    for _ in range(2):
        inputs, targets = case.inputs(8), case.targets(8)
        assert pipe.train_step(inputs, targets).loss == alone.train_step(inputs, targets)
    assert_same_weights(pipe, alone.model)


def test_saved_and_moved(tmp_path: Path) -> None:
    """A shared module of several layers has one name in checkpoints, in the optimizer's state and in the model."""
    name = "albert"
    case, model = CASES[name], CASES[name].make()
    pipe = pipeline(name, model)
    inputs, targets = case.inputs(7), case.targets(7)
    pipe.train_step(inputs, targets)
    pipe.save(tmp_path)
    named = [one for group in pipe.optimizer.state_dict()["param_groups"] for one in group["param_names"]]
    assert sorted(named) == sorted(one for one, _ in model.named_parameters())
    other = pipeline(name, case.make(), schedule="gpipe")
    other.load(tmp_path)
    pipe.schedule = "zb-h1"
    assert pipe.train_step(inputs, targets).loss == pytest.approx(other.train_step(inputs, targets).loss, abs=1e-6)
    fresh = case.make()
    fresh.load_state_dict(pipe.state_dict())
    other.load_state_dict(fresh.state_dict())
    other.optimizer.load_state_dict(pipe.optimizer.state_dict())
    pipe.resize(1)
    assert pipe.train_step(inputs, targets).loss == pytest.approx(other.train_step(inputs, targets).loss, abs=1e-6)


def test_planned_by_the_module_itself() -> None:
    case, model = CASES["unet"], CASES["unet"].make()
    inputs, targets = case.inputs(8), case.targets(8)
    plan = rp.plan(model, inputs, 2, loss=case.loss, targets=targets, chunks=[4], schedules=["1f1b"])
    assert sum(pipeline("unet", model, plan=plan).balance) == sum(rp.balance_by_time(model, 3, inputs)) == 13
    pipe = pipeline("unet", model, balance="time")
    assert pipe.train_step(inputs, targets).loss > 0


def test_deferred_batch_norm_inside_of_pieces() -> None:
    case, model = CASES["siamese"], CASES["siamese"].make()
    whole, pipe = pipeline("siamese", model, chunks=1), pipeline("siamese", model, batch_norm="deferred")
    inputs, targets = case.inputs(9), case.targets(9)
    whole.train_step(inputs, targets)
    pipe.train_step(inputs, targets)
    for key in ("tower.1.running_mean", "tower.1.num_batches_tracked"):
        assert whole.state_dict()[key].abs().sum() > 0
        assert pipe.state_dict()[key].shape == whole.state_dict()[key].shape
