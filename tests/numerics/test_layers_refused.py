"""Layers and losses that a pipeline cannot compute as one process does: refused before any weight changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import rpcpipe as rp
from support.stateful_layers import Listed, data, differing, pipeline


class Drawing(torch.autograd.Function):
    """Draws in the backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad + torch.randn_like(grad)


class Draws(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = Drawing.apply(x)  # type: ignore[no-untyped-call]
        return result


class InPlace(nn.Linear):
    """Changes what autograd needs: torch refuses, and so must a pipeline."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = super().forward(x).exp()
        hidden.mul_(2)
        return hidden


class Normalizing(nn.Linear):
    """Changes its parameter in the forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.weight.div_(self.weight.norm())
        return super().forward(x)


class Borrowing(nn.Module):
    """Uses another layer's parameter, from a list."""

    def __init__(self, other: nn.Linear) -> None:
        super().__init__()
        self.borrowed = [other.weight]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, *self.borrowed)


def penalized(model: nn.Module) -> Any:
    return lambda output, target: (
        functional.mse_loss(output, target) + sum(p.square().sum() for p in model.parameters())
    )


def _linear() -> nn.Linear:
    torch.manual_seed(2)
    return nn.Linear(4, 4)


REFUSED: dict[str, tuple[Callable[[], tuple[list[nn.Module], dict[str, Any]]], str]] = {
    "draws in the backward": (lambda: ([_linear(), Draws(), Draws(), _linear()], {}), "draws random numbers"),
    "modified in place": (lambda: ([_linear(), InPlace(4, 4), InPlace(4, 4), _linear()], {}), "inplace operation"),
    "changes a parameter": (
        lambda: ([_linear(), Normalizing(4, 4), _linear(), _linear()], {}), "changes the parameter 1.weight",
    ),
    "parameter of another layer": (
        lambda: ([first := _linear(), _linear(), Borrowing(first), _linear()], {}), "2 uses a parameter of shape",
    ),
    "parameters in the loss": (
        lambda: ([_linear() for _ in range(4)], {"loss": penalized(_linear())}), "the loss, or a function",
    ),
    "parameters in a list, versions": (
        lambda: ([_linear(), Listed(), _linear(), _linear()], {"schedule": "pipedream", "chunks": 2}),
        "1.linear.weight was not read as its module's attribute",
    ),
}  # fmt: skip


@pytest.mark.parametrize("checkpointing", ["never", "always"])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_right_is_refused_before_anything_trains(kind: str, checkpointing: str) -> None:
    setting, message = REFUSED[kind]
    layers, options = setting()
    x, y = data(1)[0]
    pipe = pipeline(layers, checkpoint=checkpointing, **options)
    before = pipe.state_dict()
    for _ in range(2):
        with pytest.raises(rp.StageError, match=message):
            pipe.train_step(x, y)
        assert not differing(pipe, before)
