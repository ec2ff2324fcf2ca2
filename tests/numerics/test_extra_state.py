"""What modules' get_extra_state returns goes where their weights go."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.errors import CheckpointError, StageError
from support.local_cluster import LocalCluster
from support.models import batches, cross_entropy, sgd


class Scaled(nn.Linear):
    """A layer whose forward depends on a value that is no tensor."""

    def __init__(self, width: int, state: Any) -> None:
        super().__init__(12, width)
        self.state = state

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


VALUES: dict[str, Any] = {
    "dict": {"scale": 2, "names": ["a", "b"], "pair": (1, None), 3: float("inf")},
    "none": None,
    "number": 1.5,
    "tensor": torch.arange(3),
    "tensors": {"seen": [torch.ones(2), 4]},
}


def pipe_of(first: Any, second: Any, **options: Any) -> rp.Pipeline:
    torch.manual_seed(1)
    model = nn.Sequential(Scaled(12, first), nn.GELU(), nn.Identity(), Scaled(4, second))
    given: Any = {"loss": cross_entropy, "optimizer": sgd, "chunks": 2, "balance": [2, 2]} | options
    return rp.Pipeline(model, LocalCluster(2), **given)  # type: ignore[arg-type]


def same(one: Any, other: Any) -> bool:
    one, other = (torch.utils._pytree.tree_flatten(value) for value in (one, other))
    return one[1] == other[1] and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one[0], other[0], strict=True)
    )


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_it_comes_with_the_state_and_goes_back(value: Any) -> None:
    pipe = pipe_of(value, {"scale": 1})
    torch.manual_seed(1)
    model = nn.Sequential(Scaled(12, None), nn.GELU(), nn.Identity(), Scaled(4, None))
    assert list(pipe.state_dict()) == list(model.state_dict())
    model.load_state_dict(pipe.state_dict())
    assert same(model[0].state, value)
    other = pipe_of(torch.zeros(7), 0)
    other.load_state_dict(model.state_dict())
    assert same(other.state_dict()["0._extra_state"], value)
    assert other.state_dict()["3._extra_state"] == {"scale": 1}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_a_checkpoint_has_it(tmp_path: Path, value: Any) -> None:
    pipe = pipe_of(value, {"scale": 1})
    pipe.train_step(*next(batches(1)))
    pipe.save(tmp_path)
    other = pipe_of(torch.zeros(7), 0, balance=[1, 3])
    other.load(tmp_path)
    assert same(other.state_dict()["0._extra_state"], value)
    assert other.stages[1].call(lambda stage: stage[-1].state) == {"scale": 1}


def test_it_moves_with_its_layer() -> None:
    pipe = pipe_of({"scale": 2}, {"scale": 3})
    pipe.schedule = "interleaved"
    assert pipe.state_dict()["3._extra_state"] == {"scale": 3}
    assert pipe.state_dict()["0._extra_state"] == {"scale": 2}


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    pipe = pipe_of({"when": threading.Event}, None)
    with pytest.raises(CheckpointError, match=r"0\._extra_state/when is a type: a checkpoint holds plain values"):
        pipe.save(tmp_path)


class Locked(Scaled):
    def get_extra_state(self) -> Any:
        return threading.Lock()


def test_what_cannot_be_sent_is_named() -> None:
    layers = [nn.Linear(12, 12), Locked(4, None)]
    pipe = rp.Pipeline(layers, LocalCluster(2), loss=cross_entropy, optimizer=sgd, chunks=2)  # type: ignore[arg-type]
    with pytest.raises(StageError, match=r"1\._extra_state, a lock, cannot be pickled"):
        pipe.state_dict()


def test_a_checkpoint_without_it_is_of_another_model(tmp_path: Path) -> None:
    layers = [nn.Linear(12, 12), nn.GELU(), nn.Identity(), nn.Linear(12, 4)]
    plain = rp.Pipeline(layers, LocalCluster(2), loss=cross_entropy, optimizer=sgd, chunks=2)  # type: ignore[arg-type]
    plain.save(tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"lacks '0\._extra_state'"):
        pipe_of(1, 2).load(tmp_path / "plain")
    pipe_of(1, 2).save(tmp_path / "extra")
    with pytest.raises(CheckpointError, match=r"this one lacks '0\._extra_state', '3\._extra_state'"):
        plain.load(tmp_path / "extra")
