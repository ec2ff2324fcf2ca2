"""Modules that are no chain of layers, cut by ``rp.split``, train as they do in a plain loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.model.microbatch import split as cut
from support.any_models import CASES, Case
from support.local_cluster import LocalCluster
from support.models import sgd

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
