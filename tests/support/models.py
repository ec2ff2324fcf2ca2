"""Small models, their data, losses and optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


class Make(nn.Module):
    """A linear layer that gives what ``make`` makes of its output."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        super().__init__()
        self.linear, self.make = nn.Linear(4, 4), make

    def forward(self, x: torch.Tensor) -> Any:
        return self.make(self.linear(x))


class Take(Make):
    """A linear layer of what ``make`` takes out of its input."""

    def forward(self, x: Any) -> Any:
        return self.linear(self.make(x))


def mlp(layers: int = 8, width: int = 12, dropout: float = 0.1) -> nn.Sequential:
    torch.manual_seed(1)
    parts: list[nn.Module] = []
    for _ in range(layers - 1):
        parts.append(nn.Sequential(nn.Linear(width, width), nn.Dropout(dropout), nn.GELU()))
    return nn.Sequential(*parts, nn.Linear(width, 4))


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


OPTIMIZERS = {"sgd": sgd, "adamw": adamw}


def cross_entropy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output, target)


def summed(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ignores target 0, as masked language modelling ignores positions."""
    kept = target != 0
    return nn.functional.cross_entropy(output[kept], target[kept], reduction="sum"), kept.sum()


def batches(count: int, size: int = 10, width: int = 12) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        yield torch.randn(size, width, generator=generator), torch.randint(0, 4, (size,), generator=generator)
