"""Layers of modules that a worker cannot import, on real workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from support.by_path import imported
from support.models import adamw, batches, cross_entropy

SOURCE = """
from torch import nn
class Net(nn.Linear): pass
class Refused(ValueError): pass
def fail(): raise Refused("here")
"""


@pytest.fixture
def by_path(tmp_path: Path) -> Iterator[Any]:
    with imported(tmp_path / "layers_by_path.py", SOURCE) as module:
        yield module


def test_layers_of_a_module_found_by_path_train(cluster: rp.Cluster, by_path: Any) -> None:
    layers = [by_path.Net(12, 12), rp.LayerSpec(by_path.Net, 12, 12), nn.GELU(), by_path.Net(12, 4)]
    pipe = rp.Pipeline(layers, cluster, loss=cross_entropy, optimizer=adamw, chunks=2)
    assert pipe.train_step(*next(batches(1))).applied
    assert isinstance(pipe.stages[0].call(lambda stage: stage[0]), by_path.Net)
    pipe.close()
    with pytest.raises(by_path.Refused, match="here"):
        cluster.call(1, by_path.fail)


def test_pipelines_of_different_default_dtypes_share_workers(cluster: rp.Cluster) -> None:
    layers = [rp.LayerSpec(nn.Linear, 12, 12) for _ in range(3)] + [rp.LayerSpec(nn.Linear, 12, 4)]
    (x, y), pipes = next(batches(1)), {}
    try:
        for dtype in torch.float64, torch.float32:
            torch.set_default_dtype(dtype)
            pipes[dtype] = rp.Pipeline(layers, cluster, loss=cross_entropy, optimizer=adamw, chunks=2)
    finally:
        torch.set_default_dtype(torch.float32)
    for _ in range(2):
        for dtype, pipe in pipes.items():
            assert pipe.train_step(x.to(dtype), y).applied
            assert pipe.stages[0].call(lambda _: torch.get_default_dtype()) == dtype
            assert pipe.state_dict()["0.weight"].dtype == dtype
    for pipe in pipes.values():
        pipe.close()
