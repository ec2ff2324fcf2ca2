"""A model as named layers: modules, or LayerSpecs from which the modules are built on their workers."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from rpcpipe._arguments import require_callable, require_kind, require_names
from rpcpipe.errors import ArgumentError, ModelError, PartitionError, require, shown
from rpcpipe.model import nest_types, rng, tied_weights
from rpcpipe.model.containers import check_container
from rpcpipe.model.microbatch import Nest
from rpcpipe.model.names import Named, full_name, prefix_of
from rpcpipe.model.wiring import Wiring, advance, live_names, required_inputs
from rpcpipe.transport import user_pickling

# loss(output, target) returns the mean as a scalar tensor, or (sum, count).
Loss = Callable[[Any, Any], Any]


class LayerSpec:
    """The module ``cls(*args, **kwargs)``, built on the layer's worker and never on the driver.

    The initial weights come from a generator seeded by (pipeline's seed, layer index), so they do not
    depend on the partition.

    ``tied="key"``: all layers with this key, on any stage, share their parameter ``weight``; its initial
    value is that of the first of these layers. Pass ``tied={"key": "token.weight"}`` where the parameter
    has another name, or to tie several parameters.
    """

    def __init__(self, cls: Any, *args: Any, tied: str | Mapping[str, str] | None = None, **kwargs: Any) -> None:
        require_callable("cls", cls, "or class that makes an nn.Module")
        require_kind("tied", tied, (str, Mapping, type(None)), "a key, a dict of parameters' names by key, or None")
        self.cls = cls
        self.tied = {tied: "weight"} if isinstance(tied, str) else dict(tied or {})
        self.args = args
        self.kwargs = kwargs

    def build(self) -> nn.Module:
        """Return the module; raises ModelError if ``cls`` does not make an ``nn.Module``."""
        module = self.cls(*self.args, **self.kwargs)
        if not isinstance(module, nn.Module):
            raise ModelError(f"{self!r} made a {type(module).__name__}, not an nn.Module")
        _check_built(module, repr(self))
        return module

    def __repr__(self) -> str:
        arguments = [repr(arg) for arg in self.args] + [f"{key}={value!r}" for key, value in self.kwargs.items()]
        arguments += [f"tied={self.tied}"] if self.tied else []
        return f"LayerSpec({getattr(self.cls, '__name__', self.cls)}, {', '.join(arguments)})"


class Wired:
    """A layer that takes and gives named values, beside the running value that passes from layer to layer.

    The layer is called as ``layer(x, *taken)`` and returns x, or with ``gives`` the tuple ``(x, *given)``.
    ``takes`` and ``gives`` are names. A name stands for the value that the nearest earlier layer gives under
    it; a name that no earlier layer gives must be a key of the inputs, which are a dict then (the whole
    dict is the first layer's x). A value is sent directly to the stages that take it, by the driver or by
    the stage that uses it before, and its gradient returns along the same route.
    """

    def __init__(
        self,
        layer: nn.Module | LayerSpec | Callable[..., Any],
        takes: str | Sequence[str] = (),
        gives: str | Sequence[str] = (),
    ) -> None:
        if isinstance(layer, Wired) or (not callable(layer) and not isinstance(layer, LayerSpec)):
            raise ArgumentError(f"Wired takes an nn.Module, a function or rp.LayerSpec, not a {type(layer).__name__}")
        self.layer = unwired(as_layer(layer, "the layer of rp.Wired"))
        self.wiring = Wiring(require_names("takes", takes), require_names("gives", gives))

    def __repr__(self) -> str:
        return f"Wired({self.layer!r}, takes={self.wiring.takes}, gives={self.wiring.gives})"


class Function(nn.Module):
    """A function as a layer without parameters, called by its name in messages and tables."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *values: Any) -> Any:
        return self.function(*values)

    def __repr__(self) -> str:
        return _name_of(self.function)


def _name_of(function: Callable[..., Any]) -> str:
    inner = getattr(function, "func", function)  # of a functools.partial
    return str(getattr(inner, "__name__", type(inner).__name__))


Layer = nn.Module | LayerSpec | Wired
# What is a chain of layers, and what ``rp.split`` makes one of.
Model = nn.Sequential | Sequence[Layer | Callable[..., Any]] | Mapping[str, Layer | Callable[..., Any]]
AnyModel = Model | nn.Module


_OTHERWISE = (
    "cut it by rp.split(model, sample), as Pipeline(model, …, sample=…) does, or write its forward as a chain of layers"
)


class Sequential(Named):
    """The layers of a pipeline as one module in this process.

    Its outputs, initial weights and ``state_dict`` equal those of ``Pipeline(layers, seed=seed)``, which
    accepts a Sequential as well. The constructor builds LayerSpecs. ``forward`` takes the inputs as a
    pipeline does; it raises ArgumentError if they lack a name that a layer takes.
    """

    def __init__(self, layers: Model, *, seed: int = 0) -> None:
        named = named_layers(layers)
        built = OrderedDict[str, nn.Module]()
        for index, (name, layer) in enumerate(named.items()):
            built[name] = build(layer, seed=seed, index=index)
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
    """Return the module or LayerSpec inside ``layer``, without its wiring."""
    return layer.layer if isinstance(layer, Wired) else layer


def wiring_of(layer: Layer) -> Wiring:
    """Return the names that ``layer`` takes and gives; none unless it is Wired."""
    return layer.wiring if isinstance(layer, Wired) else Wiring()


def check_inputs(inputs: Nest, wirings: Mapping[str, Wiring]) -> None:
    """Raise ArgumentError unless ``inputs`` has every name that a layer takes and no earlier layer gives."""
    for name, layer in required_inputs(wirings).items():
        if not isinstance(inputs, Mapping) or name not in inputs:
            actual = f"their keys are {list(inputs)}" if isinstance(inputs, Mapping) else f"a {type(inputs).__name__}"
            raise ArgumentError(
                f"layer {layer} takes {name!r}, which no layer before it gives and the inputs do not have ({actual});"
                f" pass inputs as a dict with {name!r}, or let an earlier layer give it"
            )


def named_layers(model: AnyModel) -> OrderedDict[str, Layer]:
    """Return the model's layers, in order, by their names in the unsplit model's ``state_dict``.

    A function becomes a layer without parameters. Raises ArgumentError for anything but an ``nn.Sequential``, or a
    sequence or mapping of layers, and for none of them, and ModelError for an ``nn.Sequential`` that does more than to
    call its layers.
    """
    layers = _named(model)
    require(bool(layers), "the model has no layers: pass at least one")
    return layers


def _named(model: Any) -> OrderedDict[str, Layer]:
    if isinstance(model, Sequential):
        check_container(model, Sequential)
        return OrderedDict((name, Wired(layer, *model.wirings[name])) for name, layer in model.named_children())
    if isinstance(model, nn.Sequential):
        check_container(model, nn.Sequential)
        return _separate(_distinct(model._modules))  # named_children omits a module's second use
    if isinstance(model, (nn.Module, str)) or not isinstance(model, (Sequence, Mapping)):
        raise ArgumentError(
            "model must be an nn.Sequential, or a list or dict of nn.Module, function or rp.LayerSpec, not"
            f" {type(model).__name__}; {_OTHERWISE if isinstance(model, nn.Module) else 'pass these'}"
        )
    named = dict(model) if isinstance(model, Mapping) else {str(index): layer for index, layer in enumerate(model)}
    for name in named:
        require(isinstance(name, str), f"the names of the model's layers must be strings, not {shown(name)}")
    return _separate(_distinct({name: as_layer(layer, f"layer {name}") for name, layer in named.items()}))


def _separate(layers: OrderedDict[str, Layer]) -> OrderedDict[str, Layer]:
    """Return ``layers``; raises ModelError if two give a weight or buffer the same name in the model's state_dict.

    A layer may be named inside of another's name, as "encoder" and "encoder.norm".
    """
    check_names(owned for name, layer in layers.items() for owned in _state_of(name, unwired(layer)))
    return layers


def _state_of(name: str, layer: nn.Module | LayerSpec) -> Iterator[tuple[str, str, Any]]:
    """Yield (layer, name in the model, what it is) of a layer's state."""
    if isinstance(layer, nn.Module):
        own = dict(layer.named_parameters(remove_duplicate=False)) | dict(layer.named_buffers(remove_duplicate=False))
        yield from ((name, full_name(name, key), id(own[key]) if key in own else name) for key in layer.state_dict())


def check_names(owned: Iterable[tuple[str, str, Any]]) -> None:
    """Raise ModelError if two things have one name in the model's state_dict; ``owned``: (owner, name, thing)."""
    owners = dict[str, tuple[str, Any]]()
    for owner, key, thing in owned:
        first, known = owners.setdefault(key, (owner, thing))
        if known != thing:
            raise ModelError(
                f"{key!r} in the model's state_dict is of layer {first!r} and of layer {owner!r}: one would be saved"
                " and loaded for both; rename one of these layers"
            )


def as_layer(layer: Any, what: str) -> Layer:
    """Return ``layer``, a function as a module. ``what`` names it.

    Raises ArgumentError for what is no layer, ModelError for a function that uses what training changes.
    """
    if isinstance(layer, nn.Module | LayerSpec | Wired):
        return layer
    if isinstance(layer, type):
        raise ArgumentError(f"{what} is the class {layer.__name__}; pass an instance of it, or rp.LayerSpec")
    if not callable(layer):
        raise ArgumentError(f"{what} is a {type(layer).__name__}, not an nn.Module, a function or rp.LayerSpec")
    if (held := nest_types.trainable(layer)) is not None:
        raise ModelError(
            f"{what}, the function {_name_of(layer)}, uses {held}; its parameters would be copied and never trained:"
            " write an nn.Module that has it as an attribute"
        )
    return Function(layer)


def _check_built(module: nn.Module, what: str) -> None:
    """Raise ModelError for a lazy module that has not seen an input."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            raise ModelError(
                f"{what} is lazy: its {name} has no shape yet, and without one the model can be neither cut nor"
                " trained; run the model once on a sample before, or pass a module of fixed sizes, as nn.Linear"
            )


def _distinct(layers: Mapping[str, Any]) -> OrderedDict[str, Layer]:
    """Return ``layers`` with each repeated module replaced by a copy that has the same parameters.

    Raises ModelError for a repeated module with buffers.
    """
    distinct = OrderedDict[str, Layer]()
    first_names = dict[nn.Module | LayerSpec, str]()
    for name, layer in layers.items():
        module = unwired(layer)
        if isinstance(module, nn.Module):
            _check_built(module, f"layer {name}")
        first = first_names.setdefault(module, name)
        if first != name and isinstance(module, nn.Module):
            if any(True for _ in module.buffers()):
                raise ModelError(
                    f"layer {name} is layer {first} again and has buffers, which each stage would change for itself;"
                    " use two modules"
                )
            module = copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})
            layer = Wired(module, *layer.wiring) if isinstance(layer, Wired) else module
        distinct[name] = layer
    return distinct


def find_ties(layers: Mapping[str, Layer]) -> tuple[tied_weights.Tie, ...]:
    """Return the weights that several layers share."""
    return tied_weights.find({name: unwired(layer) for name, layer in layers.items()})


def layer_of(key: str, layers: Mapping[str, Layer]) -> str:
    """Return the layer to which state entry ``key`` belongs, the one with the longest name that fits; "" if none."""
    fitting = [
        name for name, layer in layers.items() if key.startswith(prefix_of(name)) and _may_have(layer, name, key)
    ]
    return max(fitting, key=lambda name: len(prefix_of(name)), default="")


def _may_have(layer: Layer, name: str, key: str) -> bool:
    module = unwired(layer)
    return not isinstance(module, nn.Module) or key.removeprefix(prefix_of(name)) in module.state_dict()


def unpicklable(layers: Mapping[str, Layer], error: Exception, after: str = "") -> ModelError:
    """Return the error for ``layers``, whose pickling together raised ``error``; it names the first one at fault.

    ``after``: what comes before the way out.
    """
    found = "these layers: " + ", ".join(layers)
    for name, layer in layers.items():
        try:
            user_pickling.dumps(layer)
        except Exception as own:
            found, error = f"layer {name}, {_kind(layer)},", own
            break
    return ModelError(
        f"{found} cannot be pickled to go to a worker: {type(error).__name__}: {error};{after and f' {after}'} pass"
        " rp.LayerSpec(function, …), where the function builds the layer on its worker (its arguments are pickled)"
    )


def _kind(layer: Layer) -> str:
    layer = unwired(layer)
    return f"a {type(layer).__name__}" if isinstance(layer, nn.Module) else repr(layer)


def build(layer: Layer, *, seed: int, index: int) -> nn.Module:
    """Return the module of ``layer``: built from a spec with the seed of layer ``index``, or the given module."""
    layer = unwired(layer)
    if isinstance(layer, nn.Module):
        return layer
    rng.seed_init(seed, index)
    return layer.build()


def check_embeddings(name: str, module: nn.Module) -> None:
    """Raise ModelError for an embedding with ``max_norm`` in layer ``name``."""
    for path, part in module.named_modules():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.max_norm is not None:
            raise ModelError(
                f"layer {f'{name}.{path}' if path else name} is an {type(part).__name__} with max_norm={part.max_norm}:"
                " its forward changes the weight, also in evaluation, and neither the weight's copies in replicas and"
                " tied layers nor a failed step's rollback would know. Make it with max_norm=None, and renormalize in"
                " the layer's forward a copy of the rows that it looks up, or after an update by"
                " pipe.stages[k].call(function)"
            )


def parameter_counts(layers: Mapping[str, Layer]) -> list[int]:
    """Return the number of parameters of each layer; specs are built on the meta device, without memory.

    Raises PartitionError for a spec that cannot be built there (its constructor reads a tensor's value).
    """
    counts = []
    for name, layer in layers.items():
        layer = unwired(layer)
        if isinstance(layer, LayerSpec):
            try:
                with torch.device("meta"):
                    layer = layer.build()
            except ModelError:
                raise
            except Exception as error:
                raise PartitionError(
                    f"layer {name}, {layer!r}, cannot be built on the meta device to count its parameters"
                    f" ({type(error).__name__}: {error}); pass balance=[…], layers per stage"
                ) from error
        counts.append(sum(parameter.numel() for parameter in layer.parameters()))
    return counts
