"""Workers of all kinds whose state is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from support.models import adamw, sgd
from support.solo import Solo, spec_of


class Counting(torch.optim.Optimizer):
    """Counts in ints, in an attribute, and in tensors that every step makes anew."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        self.t = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.t += 1
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                state = self.state[parameter]
                state["count"] = state.get("count", 0) + 1
                state["mean"] = state.get("mean", torch.zeros_like(parameter)) * 0.9 + parameter.grad
                state["past"] = [*state.get("past", [])[-2:], parameter.grad.norm()]
                parameter.sub_(state["mean"], alpha=0.1 / state["count"] / self.t)


class Replacing(torch.optim.Optimizer):
    """Puts new memory in its parameters' place."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            parameter.data = parameter.data - 0.1 * parameter.grad


class Stateful(nn.Module):
    """Replaces a buffer in every forward, counts in an attribute, and has a view of its weight in another."""

    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.row = self.linear.weight.data[1]
        self.register_buffer("scale", torch.ones(4))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.scale = self.scale * 0.9 + 0.1 * x.detach().mean(0)
        result: torch.Tensor = self.linear(x) * self.scale + self.row
        return result


def plain() -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.1)), nn.Linear(8, 4)]


def tied() -> list[nn.Module]:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    second.bias.requires_grad_(False)
    return [first, nn.ReLU(), second]


def adamw_one_by_one(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.1, foreach=False)


KINDS: dict[str, tuple[Callable[[], Sequence[nn.Module]], Any, dict[str, Any]]] = {
    "adamw": (plain, adamw, {}),
    "adamw parameter by parameter": (plain, adamw_one_by_one, {}),
    "momentum": (plain, sgd, {}),
    "an optimizer that counts": (plain, Counting, {}),
    "an optimizer that replaces": (plain, Replacing, {}),
    "layers with state": (lambda: [Stateful(), nn.Linear(4, 4)], adamw, {}),
    "recomputed": (lambda: [Stateful(), nn.Linear(4, 4)], adamw, {"checkpoint": "always"}),
    "tied and frozen": (tied, adamw, {}),
    "deferred batch norm": (plain, sgd, {"batch_norm": "deferred"}),
}


def solo(kind: str) -> Solo:
    torch.manual_seed(0)
    layers, optimizer, options = KINDS[kind]
    return Solo.of(spec_of(layers(), optimizer, **options))
