"""Predicted and measured peaks of activations, schedule by schedule and mode by mode."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch

import rpcpipe as rp
from rpcpipe.model.layers import named_layers
from rpcpipe.planning.activation_peaks import peak_activation_bytes, peak_worker_bytes
from rpcpipe.stage.profiler import profile
from support.local_cluster import LocalCluster
from support.models import batches, cross_entropy, mlp, sgd

MODES: dict[str, tuple[Any, Any]] = {
    "never": ("never", lambda stage, chunk: False),
    "always": ("always", lambda stage, chunk: True),
    "every other": (lambda stage, chunk: chunk % 2 == 0, lambda stage, chunk: chunk % 2 == 0),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("schedule", [name for name in rp.schedules.names() if not name.startswith("pipedream")])
def test_measured_as_predicted(schedule: str, workers: int, mode: str) -> None:
    """Within 5 %; the prediction is made of a profile of the layers and the schedule alone."""
    checkpoint, drops = MODES[mode]
    pipe = rp.Pipeline(
        mlp(8, 32), LocalCluster(workers), loss=cross_entropy, optimizer=sgd, schedule=schedule, chunks=8,
        virtual_stages=rp.schedules.fewest_virtual_stages(schedule), checkpoint=checkpoint,
    )  # fmt: skip
    x, y = next(batches(1, 64, width=32))
    layers = profile(named_layers(mlp(8, 32)), x[:8].clone(), loss=cross_entropy, target=y[:8].clone())
    ends = [0, *accumulate(pipe.balance)]
    activations = [sum(layer.activation_bytes for layer in layers[a:b]) for a, b in pairwise(ends)]
    inputs = [x[:8].nbytes, *(layers[end - 1].output_bytes for end in ends[1:-1])]
    predicted = peak_activation_bytes(pipe.schedule, activations, inputs, drops)
    assert pipe.train_step(x, y).peak_activation_bytes == pytest.approx(predicted, rel=0.05)


def test_what_two_layers_save_counts_once() -> None:
    relu, linear = torch.nn.ReLU(), torch.nn.Linear(8, 8)
    found = profile(named_layers(torch.nn.Sequential(relu, linear)), torch.randn(4, 8).requires_grad_(False))
    assert [layer.activation_bytes for layer in found] == [0, 128]  # nothing before needs a gradient
    found = profile(named_layers(torch.nn.Sequential(torch.nn.Linear(8, 8), relu, linear)), torch.randn(4, 8))
    assert [layer.activation_bytes for layer in found] == [128, 128, 0]  # the linear layer saves relu's output


def test_a_workers_stages_peak_together() -> None:
    """zb-v's first worker holds the first and the last stage: their peaks do not coincide, so do not add up."""
    schedule = rp.schedules.get("zb-v", 4, 16)
    stages = peak_activation_bytes(schedule, [100] * 8, [10] * 8)
    assert peak_worker_bytes(schedule, [100] * 8, [10] * 8, [0] * 8) == ((800,) * 4, (800,) * 4)
    assert peak_worker_bytes(schedule, [100] * 8, [10] * 8, [5] * 8)[1] == (805,) * 4
    assert stages[0] + stages[7] > 800
    single = rp.schedules.get("1f1b", 4, 16)
    sizes, drops = ([10, 20, 30, 40], [1, 2, 3, 4]), lambda stage, chunk: chunk % 2 == 0
    assert peak_worker_bytes(single, *sizes, [0] * 4, drops)[0] == peak_activation_bytes(single, *sizes, drops)


def test_1f1b_is_k_over_m_of_gpipe() -> None:
    peaks = {
        name: peak_activation_bytes(rp.schedules.get(name, 4, 16), [100] * 4, [10] * 4) for name in ("gpipe", "1f1b")
    }
    assert peaks == {"gpipe": (1600,) * 4, "1f1b": (400, 300, 200, 100)}
    everything = peak_activation_bytes(rp.schedules.get("gpipe", 4, 16), [100] * 4, [10] * 4, lambda s, c: True)
    assert everything == (250,) * 4
