"""A model as named layers, some of which exist only as a recipe until they are on their worker."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from rpcpipe.errors import ArgumentError, PartitionError
from rpcpipe.model import rng, tied_weights
from rpcpipe.model.microbatch import Nest
from rpcpipe.model.wiring import Wiring, advance, live_names, required_inputs

# loss(output, target): the mean as a scalar tensor, or (sum, count).
Loss = Callable[[Any, Any], Any]


class LayerSpec:
    """``cls(*args, **kwargs)``, built on the layer's worker and never on the driver.

    Its weights are drawn from a generator seeded by (pipeline's seed, layer index), so they do
    not depend on where the model is cut.

    ``tied="key"``: all layers with this key share the parameter that they call ``weight``, on whatever
    stages they are; it is drawn as the first of them draws it. ``tied={"key": "token.weight"}`` for a
    parameter of another name, or for several.
    """

    def __init__(self, cls: Any, *args: Any, tied: str | Mapping[str, str] | None = None, **kwargs: Any) -> None:
        self.cls = cls
        self.tied = {tied: "weight"} if isinstance(tied, str) else dict(tied or {})
        self.args = args
        self.kwargs = kwargs

    def build(self) -> nn.Module:
        """The module; raises TypeError if ``cls`` does not make one."""
        module = self.cls(*self.args, **self.kwargs)
        if not isinstance(module, nn.Module):
            raise TypeError(f"{self!r} made a {type(module).__name__}, not an nn.Module")
        return module

    def __repr__(self) -> str:
        given = [repr(arg) for arg in self.args] + [f"{key}={value!r}" for key, value in self.kwargs.items()]
        given += [f"tied={self.tied}"] if self.tied else []
        return f"LayerSpec({getattr(self.cls, '__name__', self.cls)}, {', '.join(given)})"


class Wired:
    """A layer that takes and gives named values, beside the running value that goes from layer to layer.

    It is called ``layer(x, *taken)`` and returns x, or with ``gives`` the tuple ``(x, *given)``. ``takes``
    and ``gives`` are names. A name means what the last layer before has given under it; one that no
    layer before gives must be a key of the inputs, which then are a dict (all of it is the first
    layer's x). Names reach the stages that take them directly, from the driver or from the stage that
    uses them before, and so do their gradients on the way back.
    """

    def __init__(
        self, layer: nn.Module | LayerSpec, takes: str | Sequence[str] = (), gives: str | Sequence[str] = ()
    ) -> None:
        if not isinstance(layer, (nn.Module, LayerSpec)):
            raise ArgumentError(f"Wired takes an nn.Module or rp.LayerSpec, not a {type(layer).__name__}")
        self.layer = layer
        self.wiring = Wiring(*((names,) if isinstance(names, str) else tuple(names) for names in (takes, gives)))

    def __repr__(self) -> str:
        return f"Wired({self.layer!r}, takes={self.wiring.takes}, gives={self.wiring.gives})"


Layer = nn.Module | LayerSpec | Wired
Model = nn.Sequential | Sequence[Layer] | Mapping[str, Layer]


class Named(nn.Sequential):
    """Layers in a row whose names may have dots: ``bert.encoder.layer.3``, as in the unsplit model's ``state_dict``.

    To torch a dot begins a level, so what it looks up by name is done here.
    """

    def add_module(self, name: str, module: nn.Module | None) -> None:
        assert module is not None
        self._modules[name] = module

    def get_parameter(self, target: str) -> nn.Parameter:
        return dict(self.named_parameters(remove_duplicate=False))[target]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        live = self.state_dict().keys()
        missing = [key for key in live if key not in state_dict]
        unexpected = [key for key in state_dict if key not in live]
        if strict and (missing or unexpected):
            raise RuntimeError(f"the state does not fit the layers: missing {missing}, unexpected {unexpected}")
        parts: dict[str, dict[str, Any]] = {name: {} for name in self._modules}
        for key in live & state_dict.keys():
            name = layer_of(key, parts)
            parts[name][key.removeprefix(f"{name}.")] = state_dict[key]
        for name, layer in self.named_children():
            layer.load_state_dict(parts[name], strict=False, assign=assign)
        return _IncompatibleKeys(missing, unexpected)


class Sequential(Named):
    """The layers of a pipeline as one module in this process.

    Its outputs, initial weights and ``state_dict`` are those of ``Pipeline(layers, seed=seed)``, which takes
    a Sequential as well. LayerSpecs are built here. ``forward`` takes the inputs as a pipeline does;
    raises ArgumentError if they lack a name that a layer takes.
    """

    def __init__(self, layers: Model, *, seed: int = 0) -> None:
        named = named_layers(layers)
        built = OrderedDict((name, build(layer, seed=seed, index=at)) for at, (name, layer) in enumerate(named.items()))
        tied_weights.join(built, find_ties(named), built, seed)
        super().__init__(built)
        self.wirings = {name: wiring_of(layer) for name, layer in named.items()}

    def forward(self, inputs: Nest) -> Nest:
        check_inputs(inputs, self.wirings)
        flow = inputs, dict(inputs) if isinstance(inputs, Mapping) else {}
        steps = zip(self, self.wirings.values(), live_names(list(self.wirings.values())), strict=True)
        for layer, wiring, needed in steps:
            flow = advance(layer, wiring, flow, needed)
        return flow[0]


def unwired(layer: Layer) -> nn.Module | LayerSpec:
    """The layer itself."""
    return layer.layer if isinstance(layer, Wired) else layer


def wiring_of(layer: Layer) -> Wiring:
    """What ``layer`` takes and gives."""
    return layer.wiring if isinstance(layer, Wired) else Wiring()


def check_inputs(given: Nest, wirings: Mapping[str, Wiring]) -> None:
    """ArgumentError unless ``given`` has every name that no layer gives before another one takes it."""
    for name, layer in required_inputs(wirings).items():
        if not isinstance(given, Mapping) or name not in given:
            what = f"their keys are {list(given)}" if isinstance(given, Mapping) else f"a {type(given).__name__}"
            raise ArgumentError(
                f"layer {layer} takes {name!r}, which no layer before it gives and the inputs do not have ({what});"
                f" pass inputs as a dict with {name!r}, or let an earlier layer give it"
            )


def named_layers(model: Model) -> OrderedDict[str, Layer]:
    """The model's layers by the names they have in the unsplit model's ``state_dict``.

    Raises PartitionError for anything but an ``nn.Sequential``, or a sequence or mapping of layers.
    """
    if isinstance(model, Sequential):
        return OrderedDict((name, Wired(layer, *model.wirings[name])) for name, layer in model.named_children())
    if isinstance(model, nn.Sequential):
        return _distinct(model._modules)  # named_children leaves out what comes again
    if isinstance(model, nn.Module) or not isinstance(model, (Sequence, Mapping)):
        raise PartitionError(
            "model must be an nn.Sequential, or a list or dict of nn.Module / rp.LayerSpec, not"
            f" {type(model).__name__}; write its forward as a chain of layers"
        )
    named = dict(model) if isinstance(model, Mapping) else {str(index): layer for index, layer in enumerate(model)}
    for name, layer in named.items():
        if not isinstance(layer, Layer):
            raise PartitionError(f"layer {name} is a {type(layer).__name__}, not an nn.Module or rp.LayerSpec")
    return _distinct(named)


def _distinct(layers: Mapping[str, Any]) -> OrderedDict[str, Layer]:
    """``layers`` where a module that comes again is another module with the same parameters."""
    found = OrderedDict[str, Layer]()
    before = dict[nn.Module | LayerSpec, str]()
    for name, layer in layers.items():
        module = unwired(layer)
        first = before.setdefault(module, name)
        if first != name and isinstance(module, nn.Module):
            if any(True for _ in module.buffers()):
                raise PartitionError(
                    f"layer {name} is layer {first} again and has buffers, which each stage would change for itself;"
                    " use two modules"
                )
            module = copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})
            layer = Wired(module, *layer.wiring) if isinstance(layer, Wired) else module
        found[name] = layer
    return found


def find_ties(layers: Mapping[str, Layer]) -> tuple[tied_weights.Tie, ...]:
    """The weights that several layers share."""
    return tied_weights.find({name: unwired(layer) for name, layer in layers.items()})


def layer_of(key: str, layers: Container[str]) -> str:
    """The layer whose state has ``key``: the longest of ``layers`` that it begins with."""
    name = key.rpartition(".")[0]
    while name not in layers:
        name = name.rpartition(".")[0]
    return name


def build(layer: Layer, *, seed: int, index: int) -> nn.Module:
    """The module itself: built where this is called if it is a spec, as it is otherwise."""
    layer = unwired(layer)
    if isinstance(layer, nn.Module):
        return layer
    rng.seed_init(seed, index)
    return layer.build()


def parameter_counts(layers: Mapping[str, Layer]) -> list[int]:
    """Parameters per layer; specs are built without memory, on the meta device.

    Raises PartitionError for a spec whose constructor cannot do that (it reads a tensor's value).
    """
    counts = []
    for name, layer in layers.items():
        layer = unwired(layer)
        if isinstance(layer, LayerSpec):
            try:
                with torch.device("meta"):
                    layer = layer.build()
            except Exception as error:
                raise PartitionError(
                    f"layer {name}, {layer!r}, cannot be built on the meta device to count its parameters"
                    f" ({type(error).__name__}: {error}); pass balance=[…], layers per stage"
                ) from error
        counts.append(sum(parameter.numel() for parameter in layer.parameters()))
    return counts
