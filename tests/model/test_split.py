"""``rp.split``: the layers that it makes, what it refuses, and what its layers refuse."""

from __future__ import annotations

import copy
import inspect
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import rpcpipe as rp
from rpcpipe.transport import user_pickling
from support.any_models import CASES, Block, ResNet, UNet, image
from support.local_cluster import LocalCluster


class Model(nn.Module):
    """Two linear layers; a subclass says what is between them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def between(self, x: torch.Tensor) -> Any:
        return x

    def forward(self, x: torch.Tensor) -> Any:
        return self.two(self.between(self.one(x)))


class Positive(Model):
    def between(self, x: torch.Tensor) -> Any:
        return x if x.sum() > 0 else -x  # here


class Item(Model):
    def between(self, x: torch.Tensor) -> Any:
        return x * x.abs().max().item()  # here


class Numpy(Model):
    def between(self, x: torch.Tensor) -> Any:
        return x + float(np.mean(x.detach().numpy()))  # here


class Longest(Model):
    def between(self, x: torch.Tensor) -> Any:
        for _ in range(int(x.abs().max())):  # here
            x = x / 2
        return x


class Luck(Model):
    def between(self, x: torch.Tensor) -> Any:
        x = x * random.random()  # here
        return torch.tanh(x)


class Remembering(Model):
    last: Any = None

    def forward(self, x: torch.Tensor) -> Any:  # here
        self.last = x.detach()
        return self.two(self.one(x))


class Counted(Model):
    def between(self, x: torch.Tensor) -> Any:
        return torch.cat([torch.tanh(row) for row in x.split(1)])  # here


class Single(Model):
    def between(self, x: torch.Tensor) -> Any:
        return x - x.mean(0) if x.shape[0] > 1 else x  # here


class Training(Model):
    def between(self, x: torch.Tensor) -> Any:
        if self.training:
            x = x + torch.randn_like(x)  # here
        return torch.tanh(x)


class Hidden(Model):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.ones(4)

    def between(self, x: torch.Tensor) -> Any:
        return x * self.scale  # here


class Bag:
    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


class Take(nn.Module):
    def forward(self, bag: Bag) -> torch.Tensor:
        return bag.x


class Objects(Model):
    def __init__(self) -> None:
        super().__init__()
        self.take = Take()

    def between(self, x: torch.Tensor) -> Any:
        return self.take(Bag(x))  # here


class Closure(Model):
    def between(self, x: torch.Tensor) -> Any:
        return checkpoint(lambda y: self.two(y), x, use_reentrant=True)  # here


REFUSED = {
    Positive: "reads a tensor's values by bool", Item: "reads a tensor's values by item",
    Numpy: "reads a tensor's values by numpy",
    Longest: "reads a tensor's values by int", Luck: "draws random numbers of Python's",
    Remembering: "changes the attribute last", Counted: "depends on the number of rows",
    Single: "depends on the number of rows", Training: "does other things in training than in evaluation",
    Hidden: "neither a parameter nor a buffer", Objects: "passes a Bag",
    Closure: "passes a function",
}  # fmt: skip


def line_of(cls: type) -> str:
    lines, first = inspect.getsourcelines(cls)
    [at] = [index for index, line in enumerate(lines) if line.rstrip().endswith("# here")]
    return f"{__file__}:{first + at}"


@pytest.mark.parametrize("cls", REFUSED, ids=lambda cls: cls.__name__)
def test_refused_with_its_place(cls: type[Model]) -> None:
    with pytest.raises(rp.ModelError, match=REFUSED[cls]) as caught:
        rp.split(cls(), torch.randn(6, 4))
    assert str(caught.value).startswith(line_of(cls))
    assert "Move that part of the forward into a submodule" in str(caught.value)


class Inside(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.before, self.part, self.after = nn.Linear(4, 4), part, nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.after(torch.tanh(self.part(self.before(x))))


@pytest.mark.parametrize("cls", REFUSED, ids=lambda cls: cls.__name__)
def test_in_a_submodule_it_stays_whole(cls: type[Model]) -> None:
    model = Inside(cls())
    with pytest.warns(UserWarning, match=f"part stays one layer, with 50% of the parameters. .*{REFUSED[cls]}"):
        layers = rp.split(model, torch.randn(6, 4))
    assert list(layers) == ["before", "part:tanh", "after"]


def test_the_module_is_as_before() -> None:
    model = CASES["counting"].make()
    model.three.requires_grad_(False)
    sample, state = torch.randn(3, 6), copy.deepcopy(model.state_dict())
    drawn, apply = torch.random.get_rng_state(), vars(torch.autograd.Function)["apply"]
    layers = rp.split(model, sample)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    assert torch.equal(drawn, torch.random.get_rng_state())
    assert layers["meter"] is model.meter
    assert model.training
    assert not any(vars(module).get("_compiled_call_impl") for module in model.modules())
    assert vars(torch.autograd.Function)["apply"] is apply
    assert all(parameter.grad is None for parameter in model.parameters())


def test_cut_between_submodules() -> None:
    assert list(rp.split(UNet(), image(2))) == [
        "down1.0", "down1.1:max_pool2d", "down2.0", "down2.1:max_pool2d", "middle.0", "middle.1:", "up2:cat",
        "right2.0", "right2.1:", "up1:cat", "right1.0", "right1.1:", "head",
    ]  # fmt: skip


class Long(nn.Module):
    """Of many blocks none is worth opening: their parts would pass two values on."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(4, 4) for _ in range(10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_small_modules_stay_whole() -> None:
    model = Long()
    layers = rp.split(model, torch.randn(2, 4, 5, 5))
    assert list(layers) == [f"blocks.{at}" for at in range(10)]
    assert list(layers.values()) == list(model.blocks)


def test_layers_are_copied_and_sent() -> None:
    model = ResNet().eval()
    layers = rp.split(model, image(2))
    x = image(5)
    for other in (copy.deepcopy(layers), pickle.loads(user_pickling.dumps(layers))):
        assert torch.equal(rp.layers.Sequential(other).eval()(x), model(x))


def test_modes_are_those_of_the_modules() -> None:
    """Dropout as a function follows the module whose forward calls it, which may be frozen in eval mode."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.more = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.more(F.dropout(self.linear(x), 0.5, self.training))  # type: ignore[no-any-return]

    model = Inside(Part())
    model.part.eval()
    layers = rp.split(model, torch.randn(6, 4))
    assert [name for name in layers if name.startswith("part")] == ["part.linear:dropout", "part.more:tanh"]
    whole = rp.layers.Sequential(layers)
    x = torch.randn(3, 4)
    assert torch.equal(whole(x), model(x))
    model.part.train()
    whole = rp.layers.Sequential(rp.split(model, torch.randn(6, 4)))
    assert not torch.equal(whole(x), whole(x))
    assert torch.equal(whole.eval()(x), model.eval()(x))


class Shaped(nn.Module):
    """What it does depends on the length, and on a plain value of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, steps: int = 2) -> torch.Tensor:
        for _ in range(steps):
            x = torch.tanh(self.one(x))
        parts = [x[:, at] for at in range(x.shape[1])]
        return self.two(sum(parts[1:], parts[0]))  # type: ignore[no-any-return]


def test_other_shapes_and_values_than_the_samples_are_refused() -> None:
    layers = rp.layers.Sequential(rp.split(Shaped(), {"x": torch.randn(2, 3, 4), "steps": 2}))
    model = layers
    assert model({"x": torch.randn(7, 3, 4), "steps": 2}).shape == (7, 4)
    with pytest.raises(
        rp.ModelError, match=r"test_split.py:\d+: a size that is 5 here was 3 .* split it with a sample"
    ):
        model({"x": torch.randn(2, 5, 4), "steps": 2})
    with pytest.raises(rp.ModelError, match="the inputs have 3 where the sample with which the model was split had 2"):
        model({"x": torch.randn(2, 3, 4), "steps": 3})
    with pytest.raises(rp.ModelError, match=r"were .* in the sample with which the model was split"):
        model({"x": torch.randn(2, 3, 4)})


def test_a_sample_that_the_model_does_not_take_is_refused() -> None:
    with pytest.raises(rp.ArgumentError, match=r"does not run on rows of sample, as model\(sample\): .* shapes"):
        rp.split(Model(), torch.randn(6, 5))
    with pytest.raises(rp.ArgumentError, match="sample must be one micro-batch of the model's inputs"):
        rp.split(Model(), 3)
    with pytest.raises(rp.ArgumentError, match=r"of nn.Module, function or rp.LayerSpec, not int; pass these"):
        rp.Pipeline(3, LocalCluster(1))  # type: ignore[arg-type]


def test_a_module_without_a_sample_is_told_of_one() -> None:
    with pytest.raises(rp.ArgumentError, match=r"cut it by rp.split\(model, sample\)"):
        rp.Pipeline(Model(), LocalCluster(1))
    with pytest.raises(rp.ArgumentError, match=r"cut it by rp.split\(model, sample\)"):
        rp.balance_by_parameters(Model(), 2)  # type: ignore[arg-type]


def test_what_is_beside_the_forward_is_refused() -> None:
    model = Model()
    model.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(rp.ModelError, match="hooks of its own"):
        rp.split(model, torch.randn(6, 4))


class Square(torch.autograd.Function):
    """Its gradient is another than its forward's."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient * 7


class Special(Model):
    """What a recorder might not see: custom functions, calls of submodules' methods, methods that return themselves."""

    def between(self, x: torch.Tensor) -> Any:
        x = Square.apply(x)
        x = self.two.forward(x.contiguous())
        with torch.no_grad():
            scale = x.mean()
        x[:, 0] = 0.5
        values, at = x.topk(2, dim=-1)
        return x + values.sum() + at.float().mean() + scale.detach() + x.T.shape[0] / x.size(-1) ** 0.5


@pytest.mark.parametrize("rows", [1, 6])
def test_unusual_operations(rows: int) -> None:
    model = Special()
    x = torch.randn(rows, 4, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    layers = rp.layers.Sequential(rp.split(model, torch.randn(3, 4)))
    found = []
    for run, leaf in ((model, x), (layers, other)):
        model.zero_grad()
        output = run(leaf)
        output.square().sum().backward()
        found.append([output, leaf.grad, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.allclose(one, two) for one, two in zip(*found, strict=True))


class Cast(Model):
    def between(self, x: torch.Tensor) -> Any:
        return x * torch.ones(4, dtype=x.dtype, device=x.device) if x.is_floating_point() else x


def test_under_autocast() -> None:
    model, x = Cast(), torch.randn(5, 4)
    layers = rp.layers.Sequential(rp.split(model, x))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(rp.ModelError, match=r"under the same torch\.autocast"):
        layers(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rp.layers.Sequential(rp.split(model, x))(x), model(x))
    pipe = rp.Pipeline(model, LocalCluster(2), sample=x, autocast=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pipe(x), model.eval()(x))


def test_the_device_is_the_layers() -> None:
    """Positions made on the device of an input are made where the layer runs."""
    model = CASES["language"].make()
    ids = CASES["language"].inputs(3)
    layers = rp.layers.Sequential(rp.split(model, ids)).to("meta")
    assert layers(ids.to("meta")).device.type == "meta"


def test_names_of_your_own_with_a_colon() -> None:
    """Such layers have their tensors under whole names; two of them may share a module, not a name."""

    class Holder(nn.Module):
        def __init__(self, **parts: nn.Module) -> None:
            super().__init__()
            for name, part in parts.items():
                self.add_module(name, part)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in self.children():
                x = part(x)
            return x

    body, head = nn.Linear(4, 4), nn.Linear(4, 2)
    layers = {"body:first": Holder(body=body), "body:again": Holder(body=body, head=head)}
    state = rp.layers.Sequential(layers).state_dict()
    assert list(state) == ["body.weight", "body.bias", "head.weight", "head.bias"]
    pipe = rp.Pipeline(layers, LocalCluster(2))
    assert list(pipe.state_dict()) == list(state)
    pipe.load_state_dict({name: torch.zeros_like(value) for name, value in state.items()})
    assert not pipe(torch.randn(3, 4)).any()
    with pytest.raises(rp.ModelError, match=r"'body.weight' .* is of layer 'body:first' and of layer 'body:again'"):
        rp.Pipeline({**layers, "body:again": Holder(body=nn.Linear(4, 4))}, LocalCluster(2))
    with pytest.raises(rp.ScheduleError, match=r"body.weight of layer body:first and body.weight of layer body:again"):
        rp.Pipeline(
            layers, LocalCluster(2), schedule="pipedream", optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            loss=nn.functional.mse_loss,
        )  # fmt: skip
