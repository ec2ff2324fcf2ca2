"""``rp.plan``: measured or counted, and what a pipeline makes of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.model.layers import named_layers
from rpcpipe.stage.profiler import estimate
from support.local_cluster import LocalCluster
from support.models import adamw, batches, cross_entropy, mlp
from support.oracle import Oracle, assert_same_weights


def test_a_plan_is_what_the_pipeline_runs() -> None:
    x, y = next(batches(1, size=16))
    plan = rp.plan(mlp(), x, 2, loss=cross_entropy, targets=y, optimizer=adamw, latency=0.0)
    cluster = LocalCluster(2)
    pipe = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=adamw, plan=plan)
    assert pipe.schedule == rp.schedules.get(plan.schedule, 2, plan.chunks, plan.virtual_stages)
    assert (tuple(pipe.balance), pipe.chunks) == (plan.balance, plan.chunks)
    oracle = Oracle(mlp(), adamw, cross_entropy, plan.chunks)
    for batch in batches(2, size=16):
        assert pipe.train_step(*batch).loss == pytest.approx(oracle.train_step(*batch))
    assert_same_weights(pipe, oracle.model)


def test_counted_operations_follow_the_work() -> None:
    layers = [rp.LayerSpec(nn.Linear, 32, 32), rp.LayerSpec(nn.Linear, 32, 320), rp.LayerSpec(nn.Linear, 320, 4)]
    found = estimate(named_layers(layers), torch.zeros(8, 32), flops=1.0)
    assert [layer.forward for layer in found] == [2 * 8 * 32 * 32, 2 * 8 * 32 * 320, 2 * 8 * 320 * 4]
    assert [layer.weight_gradient for layer in found[1:]] == [layer.forward for layer in found[1:]]
    assert found[0].backward == found[0].forward  # the first layer's input needs no gradient
    plan = rp.plan(layers, torch.zeros(8, 32), 2, flops=1e9, chunks=[4])
    assert plan.balance == (2, 1)  # the second layer is the large one, and the first has no input gradient


def test_counting_leaves_a_module_as_it_is() -> None:
    model = mlp()
    model[0][0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = estimate(named_layers(model), torch.randn(4, 12), flops=1e9)
    assert found[0].weight_gradient == 0.0
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"memory": 0}, "memory must be a number above 0"),
        ({"memory": "lots"}, "'lots' is no number of bytes: write such as 80GiB"),
        ({"flops": -1.0}, "flops must be a finite number above 0"),
        ({"schedules": ["pipedream"]}, "schedules must be a list of some of"),
        ({"chunks": [0]}, "chunks must be at least 1"),
    ],
)
def test_what_cannot_be(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rp.plan(mlp(), torch.randn(4, 12), 2, **wrong)  # type: ignore[arg-type]
