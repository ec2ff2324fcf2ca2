"""Layers that keep state, look at autograd or write into memory: the plain loop's bits."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import rpcpipe as rp
from support.local_cluster import LocalCluster
from support.stateful_layers import LAYERS, data, differing, pipeline, plain, sgd

SYNCHRONOUS = ["naive", "gpipe", "1f1b", "zb-h1"]


def build(kind: str, index: int) -> nn.Module:
    """Return layer ``index`` of a model for ``kind``, drawn alike wherever it is built."""
    torch.manual_seed(index)
    return LAYERS[kind]() if index in (1, 2) else nn.Linear(4, 4)


@pytest.mark.parametrize("checkpointing", ["never", "always"])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_with_state_train_as_in_one_process(kind: str, checkpointing: str) -> None:
    expected = plain([build(kind, index) for index in range(4)], data(), functional.mse_loss, 4)
    for schedule in SYNCHRONOUS:
        specs = [rp.LayerSpec(build, kind, index) for index in range(4)]
        pipe = pipeline(specs, schedule=schedule, checkpoint=checkpointing)
        for x, y in data():
            pipe.train_step(x, y)
        assert not differing(pipe, expected), (schedule, checkpointing)
        pipe.close()


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "parameters in a list"])
def test_layers_with_state_under_versions_of_weights(kind: str) -> None:
    """One worker's stream is the plain loop over minibatches; two workers' is at least not silently another."""
    batches = data()
    expected = plain([build(kind, index) for index in range(4)], batches, functional.mse_loss, 1)
    pipe = rp.Pipeline(
        [rp.LayerSpec(build, kind, index) for index in range(4)], LocalCluster(1), loss=functional.mse_loss,
        optimizer=sgd, chunks=1, balance=[4], schedule="pipedream",
    )  # fmt: skip
    list(pipe.train(batches))
    assert not differing(pipe, expected)


class Popping(nn.Module):
    """Takes what it uses out of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        batch["count"] = batch.get("count", torch.zeros(())) + 1
        result: torch.Tensor = self.embedding(batch.pop("ids")) * batch["count"]
        return result


class Noisy(nn.Module):
    """Uses Python's and numpy's random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.linear(x) * random.random()
        return result


class Average:
    """A loss that remembers."""

    mean = 1.0

    def __call__(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = functional.mse_loss(output, target)
        self.mean = 0.9 * self.mean + 0.1 * loss.item()
        return loss / self.mean


@pytest.mark.parametrize("checkpointing", ["never", "except_last", "always", 0.5])
def test_recomputation_starts_from_what_the_forward_had(checkpointing: Any) -> None:
    """From the containers, the random numbers and the loss's state."""
    torch.manual_seed(0)
    (x, y), ids = data(1)[0], torch.randint(0, 10, (8,))
    layers = [nn.Linear(4, 4) for _ in range(4)]
    expected = plain(list(layers), [(x, y)], Average(), 4)
    pipe = pipeline(layers, checkpoint=checkpointing, loss=Average())
    pipe.train_step(x, y)
    assert not differing(pipe, expected)
    results = []
    for mode in ("never", checkpointing):
        torch.manual_seed(1)
        pipe = pipeline([Popping(), nn.Linear(4, 4), Noisy(), nn.Linear(4, 4)], checkpoint=mode, schedule="naive")
        random.seed(5)
        result = pipe.train_step({"ids": ids}, y)
        results.append((result.loss, result.grad_norm, pipe.state_dict()["0.embedding.weight"].tolist()))
    assert results[0] == results[1]
