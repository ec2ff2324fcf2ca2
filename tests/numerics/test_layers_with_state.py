"""Layers that keep state, look at autograd or write into memory: the plain loop's bits, or a refusal by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
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
SYNCHRONOUS = ["naive", "gpipe", "1f1b", "zb-h1"]


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
