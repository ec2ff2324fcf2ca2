"""Worker processes read the batches, by processes of their own, and one is killed."""

from __future__ import annotations

import os
import signal
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import rpcpipe as rp
from support.models import adamw, batches, cross_entropy, mlp


class Noisy(Dataset[Any]):
    def __init__(self) -> None:
        [(self.x, self.y)] = batches(1, 43)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> Any:
        return self.x[index] + torch.rand(12), self.y[index]


def make(epoch: int, processes: int = 0) -> DataLoader[Any]:
    order = torch.Generator().manual_seed(epoch)
    return DataLoader(Noisy(), 8, shuffle=True, generator=order, num_workers=processes)


@pytest.mark.parametrize("processes", [0, 1])
def test_the_bits_of_batches_from_here_though_a_reader_is_killed(processes: int) -> None:
    pipes, torch_seed = [], torch.manual_seed(3).initial_seed()
    data = list(make(1, processes))
    with rp.launch(workers=2, threads=1, timeout=20.0) as cluster:
        for _ in range(2):
            pipes.append(rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=adamw, chunks=4))
        expected = [result.loss for result in pipes[0].train(data)]
        losses, given = list[float](), rp.RemoteBatches(partial(make, 1, processes), seed=torch_seed)
        for result in pipes[1].train(given, ahead=1):
            losses.append(result.loss)
            if len(losses) == 3:
                os.kill(cluster.workers[-1].pid, signal.SIGKILL)
        assert losses == expected
        assert len(cluster.events) > 0
        assert pipes[1].evaluate(given) == pipes[0].evaluate(data)
        weights = pipes[0].state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in pipes[1].state_dict().items())
