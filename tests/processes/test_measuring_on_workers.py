"""Layers measured on a worker, for a cut and for a plan."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.pipeline.calibration import measure_overheads
from rpcpipe.pipeline.planning import cost_model
from rpcpipe.planning.overheads import Overheads
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


def test_a_cluster_shows_what_steps_take_beside_their_layers(cluster: rp.Cluster) -> None:
    found, latency = measure_overheads(cluster, spare_core=False)
    assert 1e-4 < found.step < 1.0
    assert 0 < found.action < 0.05
    assert 0 < found.dispatch < 0.05
    assert min(found.call, found.message, found.copy, latency) >= 0
    assert max(found.call, found.message, latency) < 0.5
    assert measure_overheads(cluster, spare_core=True)[0].dispatch == 0.0
    assert not cluster.pipelines  # nothing of it stays


def test_what_is_given_or_counted_is_not_measured(cluster: rp.Cluster) -> None:
    layers, x = [rp.LayerSpec(nn.Linear, 8, 8) for _ in range(4)], torch.randn(16, 8)
    given = cost_model(layers, x, cluster, chunks=[4], latency=0.25, bandwidth=1e6).machine
    assert (given.latency, given.bandwidth, given.overheads.copy) == (0.25, 1e6, 0.0)
    assert given.overheads.step > 0
    counted = cost_model(layers, x, cluster, chunks=[4], flops=1e9).machine
    assert counted.overheads == Overheads()
