"""Layers that keep state or look at autograd, and the plain loop that says what they compute."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import rpcpipe as rp
from support.local_cluster import LocalCluster

Make = Callable[[], nn.Module]


class Score(nn.Module):
    """Uses torch.func inside."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.func.vmap(torch.func.grad(lambda row: self.energy(row).tanh().sum()))(x)


class Forces(Score):
    """Uses autograd.grad inside."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            place = x.detach().requires_grad_()
            [force] = torch.autograd.grad(self.energy(place).tanh().sum(), place, create_graph=True)
        return x + force


class Recomputing(nn.Module):
    """Checkpoints inside."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = checkpoint(self.body, x, use_reentrant=self.reentrant)
        return result


class Drift(nn.Module):
    """Changes a buffer in place, or puts another in its place, before it uses it."""

    factor: torch.Tensor

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("factor", torch.ones(4))
        self.in_place = in_place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.in_place:
            self.factor.mul_(0.9)
        else:
            self.factor = self.factor * 0.9
        result: torch.Tensor = self.linear(x) * self.factor
        return result


class Remembering(nn.Module):
    """Keeps what its forward changes outside of buffers: a number, a list, generators, a tensor that it replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.factor, self.seen, self.mean = 1.0, [1.0], torch.ones(4)
        self.generator, self.random = torch.Generator().manual_seed(1), random.Random(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.factor *= 0.9
        self.seen.append(self.random.random())
        self.mean = self.mean * 0.9 + x.detach().mean(0) * 0.1
        noise = torch.rand(4, generator=self.generator) * self.seen[-1]
        result: torch.Tensor = self.linear(x) * self.factor * self.mean + noise
        return result


class Late(nn.Module):
    """Registers a buffer in its first forward, or gives it a value there."""

    def __init__(self, registered: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        if registered:
            self.register_buffer("factor", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if getattr(self, "factor", None) is None:
            self.register_buffer("factor", torch.ones(4))
        self.factor: torch.Tensor
        self.factor.mul_(0.9)
        result: torch.Tensor = self.linear(x) * self.factor
        return result


class Overlapping(nn.Module):
    """Has buffers in the same memory, one of which is a part of another, and changes them through one."""

    whole: torch.Tensor
    part: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("whole", torch.ones(4))
        self.register_buffer("part", self.whole[1:])
        self.linear.register_buffer("same", self.whole)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.whole.mul_(0.9)
        result: torch.Tensor = self.linear(x) * self.part.sum() * self.linear.same
        return result


class HooksInput(nn.Module):
    """Hooks the tensor that the layer before gave."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.register_hook(lambda grad: grad * 0.5)
        result: torch.Tensor = self.linear(x)
        return result


class Freeing(torch.autograd.Function):
    """A linear layer whose backward destroys what it has saved, and adds to the weight's gradient itself."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, owner: nn.Module) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.x, ctx.owner = x.clone(), owner
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        gradient = grad.t() @ ctx.x
        ctx.x.zero_()
        if not ctx.owner.adds:
            return grad @ weight, gradient, None
        parameter = ctx.owner.weight
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return grad @ weight, None, None


class Custom(nn.Module):
    def __init__(self, adds: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4) / 2)
        self.before, self.adds = nn.Linear(4, 4), adds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = Freeing.apply(self.before(x), self.weight, self)  # type: ignore[no-untyped-call]
        return result


class Listed(nn.Module):
    """Reads its parameters from a list."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.listed = [self.linear.weight, self.linear.bias]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, *self.listed)


class Hooked(nn.Module):
    """Scales the gradient of what it computes inside."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.linear(x)
        hidden.register_hook(lambda grad: grad * 0.5)
        return hidden.tanh()


class Halving(nn.Module):
    """Has a full backward hook."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.linear.register_full_backward_hook(lambda module, inputs, outputs: tuple(grad * 0.5 for grad in inputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(x).tanh()
        return result


def spectral() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))


def old_spectral() -> nn.Module:
    return nn.utils.spectral_norm(nn.Linear(4, 4))


def shared_norm() -> nn.Module:
    """Gain and direction of one weight, of which another use is made: an accumulator that two edges reach."""
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gain = self.layer.parametrizations.weight.original0  # type: ignore[union-attr, index]
            result: torch.Tensor = self.layer(x) * gain.t()
            return result

    return Twice()


LAYERS: dict[str, Make] = {
    "torch.func": Score,
    "autograd.grad": Forces,
    "checkpoint reentrant": lambda: Recomputing(True),
    "checkpoint": lambda: Recomputing(False),
    "buffer in place": lambda: Drift(True),
    "buffer replaced": lambda: Drift(False),
    "attributes": Remembering,
    "buffer registered by the forward": lambda: Late(False),
    "buffer without a value": lambda: Late(True),
    "buffers in one memory": Overlapping,
    "input hook": HooksInput,
    "spectral norm": spectral,
    "old spectral norm": old_spectral,
    "weight norm with its gain used twice": shared_norm,
    "function that frees": lambda: Custom(False),
    "function that adds to .grad": lambda: Custom(True),
    "parameters in a list": Listed,
    "tensor hook": Hooked,
    "module hook": Halving,
    "tracked instance norm": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, affine=True, track_running_stats=True), nn.Flatten()
    ),
}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def plain(layers: list[nn.Module], batches: Any, loss: Any, chunks: int) -> dict[str, torch.Tensor]:
    """Train a copy of ``layers`` in the loop that the documentation promises the bits of."""
    model, loss = nn.Sequential(*copy.deepcopy(layers)), copy.deepcopy(loss)
    optimizer = sgd(model.parameters())
    for x, y in batches:
        optimizer.zero_grad()
        for part, target in zip(x.chunk(chunks), y.chunk(chunks), strict=True):
            (loss(model(part), target) * (len(part) / len(x))).backward()
        optimizer.step()
    return model.state_dict()


def data(steps: int = 3, rows: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(3)
    return [(torch.randn(rows, 4), torch.randn(rows, 4)) for _ in range(steps)]


def pipeline(layers: Any, **options: Any) -> rp.Pipeline:
    return rp.Pipeline(
        layers,
        LocalCluster(2),
        **{"loss": functional.mse_loss, "optimizer": sgd, "chunks": 4, "balance": [2, 2]} | options,
    )


def differing(pipe: rp.Pipeline, expected: dict[str, torch.Tensor]) -> list[str]:
    state = pipe.state_dict()
    return [name for name, value in expected.items() if not torch.equal(state[name], value)]
