"""What goes with a layer to its worker, and from worker to worker, trains as the plain loop does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import rpcpipe as rp
from rpcpipe.errors import ModelError
from support.local_cluster import LocalCluster
from support.models import batches, cross_entropy, sgd
from support.oracle import Natural, assert_same_run

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(12, 12)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(12, 12)),
}


def model_of(make: Callable[[], nn.Module]) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(make(), nn.GELU(), make(), nn.Linear(12, 4))


def pipe_of(layers: Any, **options: Any) -> rp.Pipeline:
    given: Any = {"loss": cross_entropy, "optimizer": sgd, "chunks": 2, "balance": [2, 2]} | options
    return rp.Pipeline(layers, LocalCluster(2), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("moved", [False, True], ids=["stays", "moves"])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_layers_train_as_in_one_process(make: Callable[[], nn.Module], moved: bool) -> None:
    pipe, loop = pipe_of(model_of(make)), Natural(model_of(make), sgd, cross_entropy, 2)
    assert_same_run(pipe, loop, batches(2))
    if moved:
        pipe.schedule = "interleaved"
    assert_same_run(pipe, loop, batches(2))


class Locked(nn.Linear):
    def __init__(self) -> None:
        super().__init__(12, 12)
        self.lock = threading.Lock()


def compiled() -> nn.Module:
    layer = nn.Linear(12, 12)
    layer.compile(backend="eager")
    return layer


REFUSED: dict[str, tuple[Callable[[], rp.Pipeline], type[Exception], str]] = {
    "a lock": (lambda: pipe_of([nn.Linear(12, 12), Locked()], balance=[1, 1]), ModelError, "layer 1, a Locked"),
    "compiled": (
        lambda: pipe_of([compiled(), nn.ReLU()], balance=[1, 1]),
        ModelError,
        "layer 0, a Linear.*compile",
    ),
    "loss": (lambda: pipe_of(model_of(nn.Identity), loss=_holds()), ModelError, "^loss "),
    "optimizer": (lambda: pipe_of(model_of(nn.Identity), optimizer=_holds()), ModelError, "^optimizer "),
}


def _holds() -> Callable[..., Any]:
    lock = threading.Lock()
    return lambda *_: lock


@pytest.mark.parametrize(("make", "kind", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_pickled_is_named(make: Callable[[], Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        make()


def test_a_move_that_cannot_be_made_leaves_the_pipeline_usable() -> None:
    layers = [
        rp.LayerSpec(nn.Linear, 12, 12),
        rp.LayerSpec(Locked),
        rp.LayerSpec(Locked),
        rp.LayerSpec(nn.Linear, 12, 4),
    ]
    pipe = pipe_of(layers)
    loop = Natural(rp.layers.Sequential(layers), sgd, cross_entropy, 2)
    assert_same_run(pipe, loop, batches(2))
    with pytest.raises(ModelError, match=r"layer 1, a \w+, cannot be pickled.*nothing has moved"):
        pipe.schedule = "interleaved"
    assert_same_run(pipe, loop, batches(2))
