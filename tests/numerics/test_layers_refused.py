"""Layers and losses that a pipeline cannot compute as one process does: refused before any weight changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import rpcpipe as rp
from support.stateful_layers import Listed, data, differing, pipeline, plain


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


class Growing(nn.Linear):
    """Makes a parameter in its first forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "gain"):
            self.gain = nn.Parameter(torch.ones(4))
        return super().forward(x) * self.gain


class Recomputing(nn.Module):
    """Changes running statistics once more in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = checkpoint(self.body, x, use_reentrant=False)
        return result


class Twice(nn.Linear):
    """Gives its output, and a part of it beside it."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        hidden = super().forward(x)
        return hidden, hidden[:, 1:]


class Takes(nn.Linear):
    """Changes or hooks one of two inputs."""

    def __init__(self, hooks: bool) -> None:
        super().__init__(4, 4)
        self.hooks = hooks

    def forward(self, x: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
        whole, part = x
        if self.hooks:
            whole.register_hook(torch.sign)
        else:
            part.mul_(2)
        return super().forward(whole) + part.mean()


class Detached(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).detach()


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
    "makes a parameter": (lambda: ([_linear(), Growing(4, 4), _linear(), _linear()], {}), "makes the parameter 1.gain"),
    "changes a buffer in the backward": (
        lambda: ([_linear(), Recomputing(), _linear(), _linear()], {}), "the backward changes the buffer 1.body.1.run",
    ),
    "changes one of two tensors that overlap": (
        lambda: ([_linear(), Twice(4, 4), Takes(False), _linear()], {}), "changes its input in place",
    ),
    "hooks one of two tensors that overlap": (
        lambda: ([_linear(), Twice(4, 4), Takes(True), _linear()], {}), "hooks its input",
    ),
    "a loss without a gradient": (
        lambda: ([_linear(), _linear(), _linear(), Detached(4, 4)], {}), "loss does not require a gradient",
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
OTHER_TYPES = {"modified in place": RuntimeError, "parameters in a list, versions": rp.ScheduleError}


@pytest.mark.parametrize("checkpointing", ["never", "always"])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_right_is_refused_before_anything_trains(kind: str, checkpointing: str) -> None:
    setting, message = REFUSED[kind]
    layers, options = setting()
    x, y = data(1)[0]
    pipe = pipeline(layers, checkpoint=checkpointing, **options)
    before = pipe.state_dict()
    for _ in range(2):
        with pytest.raises(OTHER_TYPES.get(kind, rp.ModelError), match=message) as caught:
            pipe.train_step(x, y)
        assert isinstance(caught.value, rp.StageError)
        assert not differing(pipe, before)


class Scaling(nn.Linear):
    """Changes a tensor that is no buffer in place."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.factor = torch.ones(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.factor.mul_(0.9)
        return super().forward(x) * self.factor.clone()


def test_a_recomputation_that_would_change_a_tensor_once_more_is_refused() -> None:
    x, y = data(1)[0]
    pipe = pipeline([_linear(), Scaling(), _linear(), _linear()], checkpoint="always")
    with pytest.raises(rp.ModelError, match=r"changes the tensor Scaling\.factor in place"):
        pipe.train_step(x, y)


def test_a_backward_may_change_buffers_where_each_follows_its_forward() -> None:
    layers = [_linear(), Recomputing(), _linear(), _linear()]
    pipe = pipeline(layers, schedule="naive")
    for x, y in data():
        pipe.train_step(x, y)
    assert not differing(pipe, plain(layers, data(), functional.mse_loss, 4))
