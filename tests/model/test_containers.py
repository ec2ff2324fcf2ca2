"""A container that does more than to call its layers, and memory that layers of different stages share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.errors import ModelError, StageError
from support.local_cluster import LocalCluster
from support.models import batches, cross_entropy, mlp, sgd
from support.oracle import Natural, assert_same_run


class Residual(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


class Called(nn.Sequential):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().__call__(x)


class KeptInEval(nn.Sequential):
    def train(self, mode: bool = True) -> KeptInEval:
        return super().train(False)


class ResidualOfOurs(rp.layers.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


class Renamed(nn.Sequential):
    """With a method that changes nothing of what its layers do."""

    def extra_repr(self) -> str:
        return "renamed"

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self(x)


def layers() -> list[nn.Module]:
    torch.manual_seed(1)
    return [nn.Linear(12, 12), nn.Linear(12, 4)]


def changed(
    change: Callable[[nn.Sequential], Any], kind: Callable[..., nn.Sequential] = nn.Sequential
) -> nn.Sequential:
    model = kind(*layers()) if kind is nn.Sequential else kind(layers())
    change(model)
    return model


def replace_forward(model: nn.Sequential) -> None:
    model.forward = lambda x: x  # type: ignore[method-assign]


def own_parameter(model: nn.Sequential) -> None:
    model.bias = nn.Parameter(torch.zeros(4))


CONTAINERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "forward": (lambda: Residual(*layers()), r"a Residual, has its own forward\(\)"),
    "ours": (lambda: ResidualOfOurs(layers()), r"its own forward\(\)"),
    "call": (lambda: Called(*layers()), r"its own __call__\(\)"),
    "train": (lambda: KeptInEval(*layers()), r"its own train\(\)"),
    "replaced": (lambda: changed(replace_forward), r"its own forward\(\)"),
    "forward hook": (lambda: changed(lambda m: m.register_forward_hook(lambda *_: None)), r"hooks.*forward hooks"),
    "of ours": (
        lambda: changed(lambda m: m.register_forward_hook(lambda *_: None), rp.layers.Sequential),
        r"hooks.*forward hooks",
    ),
    "pre-hook": (lambda: changed(lambda m: m.register_forward_pre_hook(lambda *_: None)), "forward pre hooks"),
    "backward": (lambda: changed(lambda m: m.register_full_backward_hook(lambda *_: None)), "backward hooks"),
    "parameter": (lambda: changed(own_parameter), "a parameter of its own, 'bias'"),
    "buffer": (lambda: changed(lambda m: m.register_buffer("scale", torch.ones(1))), "a buffer of its own, 'scale'"),
    "compile": (lambda: changed(lambda m: m.compile(backend="eager")), "been compiled"),
}


def pipe_of(model: Any, **options: Any) -> rp.Pipeline:
    given: Any = {"loss": cross_entropy, "optimizer": sgd, "chunks": 2} | options
    return rp.Pipeline(model, LocalCluster(2), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(("make", "words"), CONTAINERS.values(), ids=CONTAINERS)
def test_a_container_that_does_more_than_its_layers_is_refused(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(ModelError, match=f"(?s){words}.*as one layer"):
        pipe_of(make())


def test_as_one_layer_it_trains_as_in_one_process() -> None:
    def model() -> nn.Sequential:
        torch.manual_seed(1)
        inner = changed(lambda m: m.register_forward_hook(lambda _, __, out: 2 * out))
        return nn.Sequential(Residual(nn.Linear(12, 12)), inner)

    assert_same_run(pipe_of(list(model())), Natural(model(), sgd, cross_entropy, 2), batches(2))


def test_a_subclass_that_only_adds_methods_is_taken() -> None:
    assert_same_run(pipe_of(Renamed(*layers())), Natural(nn.Sequential(*layers()), sgd, cross_entropy, 2), batches(2))


GLOBAL = ("register_module_forward_hook", "register_module_forward_pre_hook", "register_module_full_backward_hook")


@pytest.mark.parametrize("register", GLOBAL)
def test_hooks_on_all_modules_are_refused(register: str) -> None:
    handle = getattr(nn.modules.module, register)(lambda *_: None)
    try:
        with pytest.raises(ModelError, match="hooks on all modules"):
            pipe_of(mlp(2))
    finally:
        handle.remove()


# --- shared memory ---


class Constant(nn.Module):
    """Adds a table; ``counts``: changes it, too."""

    def __init__(self, table: torch.Tensor, width: int = 12, *, counts: bool = False) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.linear, self.counts = nn.Linear(12, width), counts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.counts:
            self.table += 1
        return self.linear(x) + self.table[0]


def two(make: Callable[[], tuple[nn.Module, nn.Module]]) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(*make())


def one_norm() -> tuple[nn.Module, nn.Module]:
    norm = nn.BatchNorm1d(12)
    return nn.Sequential(norm, nn.Linear(12, 12)), nn.Sequential(nn.Linear(12, 12), norm)


def one_memory() -> tuple[nn.Module, nn.Module]:
    first, second = nn.Linear(12, 12), nn.Linear(12, 12)
    second.weight.data = first.weight.data
    return first, second


def parameter_and_buffer() -> tuple[nn.Module, nn.Module]:
    first = nn.Linear(12, 12)
    return first, Constant(first.weight.data[:1, :1])


SHARED: dict[str, tuple[Callable[[], tuple[nn.Module, nn.Module]], str]] = {
    "one norm in two layers": (one_norm, r"0\.0\.\w+ and 1\.1\.\w+ are one buffer.*a BatchNorm1d each"),
    "parameters of one memory": (one_memory, "0.weight and 1.weight lie in the same memory"),
    "a parameter and a buffer": (parameter_and_buffer, "0.weight and 1.table lie in the same memory"),
}


@pytest.mark.parametrize(("make", "words"), SHARED.values(), ids=SHARED)
def test_memory_of_two_layers_that_changes_is_refused(
    make: Callable[[], tuple[nn.Module, nn.Module]], words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        pipe_of(two(make))


def constants(*, counts: bool = False, views: bool = False) -> tuple[nn.Module, nn.Module]:
    table = torch.full((2, 1), 0.5)
    return Constant(table), Constant(table[:1] if views else table, 4, counts=counts)


@pytest.mark.parametrize("views", [False, True], ids=["one buffer", "views"])
def test_a_buffer_that_no_forward_changes_may_be_shared(views: bool) -> None:
    pipe = pipe_of(two(lambda: constants(views=views)))
    assert_same_run(pipe, Natural(two(lambda: constants(views=views)), sgd, cross_entropy, 2), batches(2))


@pytest.mark.parametrize("views", [False, True], ids=["one buffer", "views"])
def test_a_shared_buffer_that_a_forward_changes_fails_the_first_step(views: bool) -> None:
    pipe = pipe_of(two(lambda: constants(counts=True, views=views)))
    before = {name: value.clone() for name, value in pipe.state_dict().items()}
    with pytest.raises(StageError, match=r"1\.table is a buffer that several layers share") as caught:
        pipe.train_step(*next(batches(1)))
    assert isinstance(caught.value, ModelError)
    assert all(torch.equal(before[name], value) for name, value in pipe.state_dict().items())


def test_one_norm_twice_in_a_layer_is_fine() -> None:
    def model() -> nn.Sequential:
        torch.manual_seed(1)
        norm = nn.BatchNorm1d(12)
        return nn.Sequential(nn.Sequential(norm, nn.Linear(12, 12), norm), nn.Linear(12, 4))

    assert_same_run(pipe_of(model()), Natural(model(), sgd, cross_entropy, 2), batches(2))
