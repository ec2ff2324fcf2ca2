"""Functions as layers, and modules whose parameters have no shape yet."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from support.local_cluster import LocalCluster
from support.models import sgd
from support.oracle import assert_same_weights

TABLE = torch.arange(4.0)
MODULE = nn.Linear(4, 4)


def flatten(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1)


def with_table(x: torch.Tensor) -> torch.Tensor:
    return x + TABLE


def with_global_module(x: torch.Tensor) -> torch.Tensor:
    return MODULE(x)


class Doubling:
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def mse(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(output, target)


FUNCTIONS: dict[str, tuple[Any, str]] = {
    "a function": (flatten, "flatten"),
    "a lambda": (lambda x: x * 2, "<lambda>"),
    "of torch": (torch.relu, "relu"),
    "of nn.functional": (nn.functional.gelu, "gelu"),
    "a partial": (partial(torch.mul, other=2.0), "mul"),
    "an object": (Doubling(), "Doubling"),
    "with a constant": (with_table, "with_table"),
    "dropout": (lambda x: nn.functional.dropout(x, 0.5), "<lambda>"),
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_a_function_is_a_layer_without_parameters(kind: str) -> None:
    function, name = FUNCTIONS[kind]
    torch.manual_seed(1)
    first, last = nn.Linear(4, 4), nn.Linear(4, 4)
    models: list[Any] = [
        [first, function, last],
        {"a": first, "f": function, "b": last},
        [first, rp.Wired(function), last],
    ]
    x, y = torch.randn(8, 4), torch.randn(8, 4)
    states = []
    for model in models:
        reference = rp.layers.Sequential(copy.deepcopy(model))
        assert repr(list(reference)[1]) == name
        pipe = rp.Pipeline(
            copy.deepcopy(model), LocalCluster(3), loss=mse, optimizer=sgd, chunks=2, balance=[1, 1, 1]
        )  # type: ignore[arg-type]  # fmt: skip
        pipe.train_step(x, y)
        states.append(list(pipe.state_dict().values()))
        assert len(states[-1]) == 4
        if kind != "dropout":
            optimizer = sgd(list(reference.parameters()))
            for a, b in zip(x.chunk(2), y.chunk(2), strict=True):
                (mse(reference(a), b) * 0.5).backward()
            optimizer.step()
            assert_same_weights(pipe, reference)
    for state in states[1:]:
        assert all(torch.equal(a, b) for a, b in zip(state, states[0], strict=True))


def closes_over(value: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: value(x) if callable(value) else x @ value


REFUSED: dict[str, tuple[Any, str]] = {
    "a module in a closure": (closes_over(nn.Linear(4, 4)), "value, a Linear"),
    "a parameter in a closure": (closes_over(nn.Parameter(torch.ones(4, 4))), "value, a Parameter"),
    "a global module": (with_global_module, "MODULE, a Linear"),
    "a method of a module": (nn.Linear(4, 4).forward, "a Linear"),
    "a partial over a module": (partial(lambda x, m: m(x), m=nn.Linear(4, 4)), "a Linear"),
    "a class": (nn.ReLU, "is the class ReLU; pass an instance"),
    "a number": (3, "is a int, not an nn.Module, a function or rp.LayerSpec"),
    "lazy": (nn.LazyLinear(4), "layer 1 is lazy: its weight has no shape yet"),
    "lazy inside": (nn.Sequential(nn.ReLU(), nn.LazyBatchNorm1d()), "layer 1 is lazy: its 1.weight has no shape"),
    "lazy by a spec": (rp.LayerSpec(nn.LazyLinear, 4), "is lazy: its weight has no shape yet"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_not_be_trained_is_refused_when_the_pipeline_is_made(kind: str) -> None:
    layer, words = REFUSED[kind]
    error = rp.ArgumentError if kind in ("a class", "a number") else rp.ModelError
    for balance in ("parameters", [1, 1]):
        with pytest.raises(error, match=words):
            rp.Pipeline([nn.Linear(4, 4), layer], LocalCluster(2), loss=mse, optimizer=sgd, balance=balance)  # type: ignore[arg-type]


def test_a_lazy_module_that_has_seen_an_input_is_an_ordinary_one() -> None:
    model = nn.Sequential(OrderedDict(a=nn.LazyLinear(4), b=nn.Linear(4, 4)))
    model(torch.randn(2, 3))
    pipe = rp.Pipeline(model, LocalCluster(2), loss=mse, optimizer=sgd, chunks=2)  # type: ignore[arg-type]
    pipe.train_step(torch.randn(4, 3), torch.randn(4, 4))
