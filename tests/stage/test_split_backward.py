"""I and W together are B to the bit; W's work is really put off, and what only I needed is freed."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from rpcpipe.stage import autograd, split_backward
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


class Scaled(nn.Module):
    """Parameters that are broadcast, and one that is added to a part of the activation in place."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale, self.part = nn.Parameter(torch.randn(dim)), nn.Parameter(torch.randn(2, 1, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.tanh(x) * self.scale
        out[..., :3] *= self.part
        return out.tanh()


def tied(dim: int) -> nn.Module:
    """The first layer's weight is used again: alone, and twice."""
    first, twice = nn.Linear(dim, dim), Shared(dim)
    return nn.Sequential(first, nn.GELU(), twice.linear, nn.GELU(), first, twice)


def frozen(dim: int) -> nn.Module:
    layer = nn.Linear(dim, dim)
    layer.weight.requires_grad_(False)
    return nn.Sequential(layer, nn.Linear(dim, dim, bias=False))


MODELS: dict[str, Any] = {
    "linear": lambda dim: nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim)),
    "attention": lambda dim: nn.Sequential(Attention(dim), Attention(dim)),
    "shared": Shared,
    "conv": Conv,
    "batch norm": lambda dim: nn.Sequential(nn.Conv1d(5, 5, 3, padding=1), nn.BatchNorm1d(5), nn.ReLU(), Conv(dim)),
    "scaled": lambda dim: nn.Sequential(Scaled(dim), Scaled(dim)),
    "tied": tied,
    "checkpointed": lambda dim: nn.Sequential(Attention(dim), Checkpointed(dim)),
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


class Checkpointed(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return out


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


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket._qualified_op_name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def halves(module: nn.Module, x: torch.Tensor) -> tuple[Counter[str], Counter[str]]:
    """Return the operations of I and of W."""
    nest, entered = autograd.enter(StageInput(x, [True]))
    out = module(nest)
    with Operations() as first:
        _, deferred = backward_input(Saved.of(out, entered), [torch.ones_like(out)])
    with Operations() as second:
        backward_weight(deferred)
    return first.counts, second.counts


def test_the_work_is_divided() -> None:
    module = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
    first, second = halves(module, torch.randn(4, 8))
    assert (first["mm"], second["mm"]) == (3, 3)


@pytest.mark.parametrize("name", ["linear", "attention", "batch norm"])
def test_no_operation_runs_twice(name: str) -> None:
    module, x = MODELS[name](8), torch.randn(2, 5, 8)
    run(module, x, split=False)  # so that .grad is there
    nest, entered = autograd.enter(StageInput(x, [True]))
    out = module(nest)
    with Operations() as whole:
        autograd.backward(Saved.of(out, entered), [torch.ones_like(out)])
    both = sum(halves(module, x), Counter())
    # A convolution is one operation for both of its products.
    free = {"detach", "empty", "as_strided", "view", "convolution_backward"}
    assert {name: both[name] - count for name, count in whole.counts.items() if both[name] > count}.keys() <= free


def test_a_norm_reads_what_arrives_once() -> None:
    first, second = halves(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8)), torch.randn(4, 8))
    assert (first["native_layer_norm_backward"], second["native_layer_norm_backward"]) == (2, 0)


def test_the_number_of_runs_of_the_engine_does_not_depend_on_that_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    engine = split_backward._engine_run_backward
    monkeypatch.setattr(split_backward, "_engine_run_backward", lambda *a, **k: runs.append(0) or engine(*a, **k))
    found = []
    for count in (2, 8):
        runs.clear()
        halves(nn.Sequential(*[nn.Linear(8, 8) for _ in range(count)]), torch.randn(4, 8))
        found.append(len(runs))
    assert found == [2, 2]


def test_what_only_the_input_gradient_needed_is_freed_after_it() -> None:
    module = nn.Sequential(nn.Linear(64, 64), nn.Sigmoid(), nn.Linear(64, 64), nn.Softmax(-1))
    nest, entered = autograd.enter(StageInput(torch.randn(32, 64), [True]))
    hidden = module[:3](nest)
    out = module[3](hidden)
    softmax_result = weakref.ref(out.untyped_storage())
    saved = Saved.of([out], entered)
    del out, hidden, nest
    _, deferred = backward_input(saved, [torch.randn(32, 64)])
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


class Watched(nn.Module):
    """Hooks what autograd has between the layers: tensors, and nodes before and after they run."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.scale = nn.Parameter(torch.randn(dim))
        self.calls: list[str] = []

    def note(self, name: str, grads: Any) -> Any:
        self.calls.append(name)
        return tuple(None if grad is None else grad.tanh() for grad in grads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x.register_hook(lambda grad: self.note("tensor", [grad])[0])
        x = self.second(x)
        x.grad_fn.register_prehook(lambda grads: self.note("before", grads))  # type: ignore[union-attr]
        x = x * self.scale
        x.register_hook(lambda grad: self.note("output", [grad])[0])
        x.grad_fn.register_hook(lambda grads, _: self.note("after", grads))  # type: ignore[union-attr]
        return x


def test_hooks_inside_a_layer_run_once() -> None:
    grads, calls = [], []
    for split in (False, True):
        torch.manual_seed(0)
        module = nn.Sequential(Watched(8), Watched(8))
        inputs = [run(module, torch.randn(4, 8), split=split)[0] for _ in range(3)]
        grads.append([*inputs, *(parameter.grad for parameter in module.parameters())])
        calls.append([sorted(watched.calls) for watched in module])  # type: ignore[arg-type]
    assert calls[0] == calls[1] == [sorted(["after", "before", "output", "tensor"] * 3)] * 2
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_the_first_half_keeps_no_gradient_that_only_it_needed() -> None:
    """A weight that is used twice gets its gradient there: what arrived at its products is forgotten."""
    linear = nn.Linear(8, 8)
    nest, entered = autograd.enter(StageInput(torch.randn(4, 8), [True]))
    hidden = linear(nest)
    arrived: list[Any] = []
    hidden.register_hook(lambda grad: arrived.append(weakref.ref(grad.untyped_storage())))
    saved = Saved.of(nn.Linear(8, 8)(linear(hidden).tanh()), entered)
    _, deferred = backward_input(saved, [torch.randn(4, 8)])
    assert len(arrived) == len(deferred.branches) == 1
    assert arrived[0]() is None
