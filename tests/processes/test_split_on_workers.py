"""A module of this file, cut by ``rp.split``, on real processes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

import rpcpipe as rp
from support.models import cross_entropy, sgd


class Skipping(nn.Module):
    """Positions made on the device of its input, a skip connection, tied weights, dropout that is off."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.one = nn.Embedding(13, 8), nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.two, self.head = nn.Linear(8, 8), nn.Linear(8, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> Any:
        first = self.embed(ids) + torch.arange(ids.shape[1], device=ids.device).unsqueeze(-1) * self.scale
        x = nn.functional.dropout(torch.tanh(self.one(first)), 0.0, self.training)
        return self.head(self.two(x).view(ids.size(0), -1, 8) + first).transpose(1, 2)


def test_a_module_goes_to_workers_in_pieces(cluster: rp.Cluster) -> None:
    torch.manual_seed(3)
    model = Skipping()
    alone, ids = copy.deepcopy(model), torch.randint(0, 13, (7, 5))
    pipe = rp.Pipeline(
        model, cluster, sample=ids[:2], balance=[1, 1, 1, 1], loss=cross_entropy, optimizer=sgd, chunks=3
    )  # fmt: skip
    optimizer = sgd(list(alone.parameters()))
    for _ in range(2):
        loss = sum(cross_entropy(alone(part), part) * (len(part) / 7) for part in ids.chunk(3))
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert abs(pipe.train_step(ids, ids).loss - loss.item()) < 1e-6
    state = pipe.state_dict()
    pipe.close()
    assert state.keys() == alone.state_dict().keys()
    assert all(torch.allclose(state[key], value, atol=1e-6) for key, value in alone.state_dict().items())
