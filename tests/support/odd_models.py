"""Modules whose forwards do what a recorder might miss: each three linear layers of 4, and something between."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)


class Aliased(Three):
    """Values that share memory, of which one is changed in place, used before and after."""

    def forward(self, x: torch.Tensor) -> Any:
        a = self.one(x)
        copy, half = a * 1.0, a[:, :2]
        early = self.two(copy.clone())
        copy.add_(1)
        half.mul_(2)
        return self.three(torch.tanh(early)) + copy + a


class Checkpointed(Three):
    def forward(self, x: torch.Tensor) -> Any:
        x = checkpoint(lambda y: torch.tanh(self.two(y)), self.one(x), use_reentrant=False)
        return self.three(x)


class WithoutGrad(Three):
    def forward(self, x: torch.Tensor) -> Any:
        with torch.no_grad():
            fixed = self.one(x)
        return self.three(self.two(x) + fixed)


class Penalised(Three):
    """Gradients of what several submodules make, inside of the forward."""

    def forward(self, x: torch.Tensor) -> Any:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = self.two(torch.tanh(self.one(x)))
            [gradient] = torch.autograd.grad(y.sum(), x, create_graph=True)
        return self.three(y + gradient)


class Filled(Three):
    def forward(self, x: torch.Tensor) -> Any:
        out, hidden = x.new_zeros(x.shape[0], 4), self.one(x)
        for at in range(4):
            out[:, at] = hidden[:, 3 - at] * at
        return self.three(self.two(out) + out)


class Experts(Three):
    """Rows that are routed by values, without asking for these."""

    def forward(self, x: torch.Tensor) -> Any:
        _, best = self.one(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for at, expert in enumerate((self.two, self.three)):
            chosen = (best == at).any(-1)
            out[chosen] = expert(x[chosen])
        return out


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.two = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        self.three = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.three(F.relu(self.two(self.one(x))) + x)


class Lists(nn.Module):
    """Parameters in lists and dicts, used by functions."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(4, 4)) for _ in range(3)])
        self.linear, self.scales = nn.Linear(4, 4), nn.ParameterDict({"a": nn.Parameter(torch.ones(4))})

    def forward(self, x: torch.Tensor) -> Any:
        for weight in self.weights:
            x = torch.tanh(x @ weight)
        return self.linear(x) * self.scales["a"] + x @ self.weights[0]


class TwoNames(nn.Module):
    """One module under two names, one of them unused; a module that no forward calls."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.again, self.unused = self.one, nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))

    def forward(self, x: torch.Tensor) -> Any:
        return self.two(torch.tanh(self.one(x))) + self.one(self.two(x))


ODD = [
    Aliased, Checkpointed, WithoutGrad, Penalised, Filled, Experts, Normed, Lists, TwoNames,
]  # fmt: skip
