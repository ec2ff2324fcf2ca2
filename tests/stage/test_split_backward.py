"""I and W together are B to the bit; W's work is really put off, and what only I needed is freed."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode

from rpcpipe.stage import autograd
from rpcpipe.stage.autograd import Saved, StageInput
from rpcpipe.stage.split_backward import backward_input, backward_weight


class Attention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.randn(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        mixed = nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0]
        return x + self.out(nn.functional.gelu(mixed)) + self.bias


class Shared(nn.Module):
    """One weight used twice, and an output branch that does not depend on the input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.free = nn.Parameter(torch.randn(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.tanh(self.linear(x))) + (self.free * 3).exp()


class Conv(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(5, 5, 3, padding=1), nn.GroupNorm(1, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)).relu_()


def frozen(dim: int) -> nn.Module:
    layer = nn.Linear(dim, dim)
    layer.weight.requires_grad_(False)
    return nn.Sequential(layer, nn.Linear(dim, dim, bias=False))


MODELS: dict[str, Any] = {
    "linear": lambda dim: nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim)),
    "attention": lambda dim: nn.Sequential(Attention(dim), Attention(dim)),
    "shared": Shared,
    "conv": Conv,
    "frozen": frozen,
    "nothing to learn": lambda dim: nn.ReLU(),
    "identity": lambda dim: nn.Identity(),
    "residual": lambda dim: Residual(dim),
    "lstm": lambda dim: nn.Sequential(nn.RNN(dim, dim, batch_first=True), First()),
}


class Residual(nn.Module):
    """Passes its input through beside what it makes of it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, self.linear(x)


class First(nn.Module):
    def forward(self, x: Any) -> Any:
        return x[0]


def run(module: nn.Module, x: torch.Tensor, *, split: bool, requires_grad: bool = True) -> Any:
    nest, entered = autograd.enter(StageInput(x, [requires_grad]))
    if not requires_grad and isinstance(module, nn.Sequential):  # as a first stage does
        hidden = module[0](nest)
        if isinstance(hidden, torch.Tensor) and hidden.requires_grad:
            entered.inner = [get_gradient_edge(hidden)]
        out = module[1:](hidden)
    else:
        out = module(nest)
    saved = Saved.of(out, entered)
    grads: list[torch.Tensor | None] = [torch.ones_like(o).cumsum(-1) for o in autograd.differentiable(out)]
    if not split:
        return autograd.backward(saved, grads)
    inputs, deferred = backward_input(saved, grads)
    backward_weight(deferred)
    return inputs


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_both_halves_give_the_bits_of_the_whole(name: str, requires_grad: bool) -> None:
    torch.manual_seed(0)
    module = MODELS[name](8)
    results = []
    for split in (False, True):
        module.zero_grad()
        inputs = []
        for seed in range(3):  # gradients of several micro-batches add up
            x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(seed))
            inputs.append(list(run(module, x, split=split, requires_grad=requires_grad)))
        results.append((inputs, [p.grad for p in module.parameters()]))
    for a, b in zip(results[0][0], results[1][0], strict=True):
        assert all(x is y is None or torch.equal(x, y) for x, y in zip(a, b, strict=True))
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert a is b is None or torch.equal(a, b)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


def test_the_work_is_divided_and_none_is_done_twice() -> None:
    module = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
    nest, entered = autograd.enter(StageInput(torch.randn(4, 8), [True]))
    saved = Saved.of(module(nest), entered)
    with Products() as first:
        _, deferred = backward_input(saved, [torch.ones(4, 8)])
    with Products() as second:
        backward_weight(deferred)
    assert (first.count, second.count) == (3, 3)


def test_what_only_the_input_gradient_needed_is_freed_after_it() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 8), nn.Softmax(-1))
    nest, entered = autograd.enter(StageInput(torch.randn(4, 8), [True]))
    hidden = module[:3](nest)
    out = module[3](hidden)
    softmax_result = weakref.ref(out.untyped_storage())
    saved = Saved.of([out], entered)
    del out, hidden, nest
    _, deferred = backward_input(saved, [torch.randn(4, 8)])
    del saved
    assert softmax_result() is None
    backward_weight(deferred)
    assert all(p.grad is not None for p in module.parameters())


def test_a_parameters_hooks_run_once() -> None:
    for make in (lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), lambda: Shared(8)):
        torch.manual_seed(0)
        grads = []
        for split in (False, True):
            torch.manual_seed(0)
            module = make()
            for parameter in module.parameters():
                parameter.register_hook(lambda grad: grad * 0.5)
            run(module, torch.randn(4, 8), split=split)
            grads.append([p.grad for p in module.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
