"""Layers measured on a worker, for a cut and for a plan."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rpcpipe as rp
from support.models import cross_entropy, mlp, sgd


def test_the_worker_measures_for_the_pipeline(cluster: rp.Cluster) -> None:
    layers = [rp.LayerSpec(nn.Linear, 8, 8), *(rp.LayerSpec(nn.Tanh) for _ in range(7))]
    pipe = rp.Pipeline(
        layers, cluster, loss=nn.functional.mse_loss, optimizer=sgd, balance="memory", sample=torch.randn(4096, 8)
    )
    assert pipe.balance == [2, 2, 2, 2]
    pipe.close()
    with pytest.raises(ValueError, match="needs sample=…: one micro-batch of inputs"):
        rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=sgd, balance="time")
    with pytest.raises(ValueError, match="or one of \\('parameters', 'time', 'memory'\\)"):
        rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=sgd, balance="luck")


def test_it_measures_on_a_worker(cluster: rp.Cluster) -> None:
    """The driver needs no model: LayerSpecs are built over there."""
    built_here: list[int] = []

    class Layer(nn.Linear):
        def __init__(self) -> None:
            built_here.append(1)
            super().__init__(8, 8)

    x = torch.randn(16, 8)
    plan = rp.plan([rp.LayerSpec(Layer) for _ in range(6)], x, cluster, loss=nn.functional.mse_loss, targets=x,
                   chunks=[8], schedules=["1f1b", "gpipe"], optimizer=sgd)  # fmt: skip
    assert not built_here
    assert plan.chunks == 8
    assert plan.schedule in ("1f1b", "gpipe")
    assert len(plan.balance) == 4
