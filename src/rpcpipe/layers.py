"""A model as named layers, some of which exist only as a recipe until they are on their worker."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rpcpipe import rng
from rpcpipe.errors import PartitionError


class LayerSpec:
    """``cls(*args, **kwargs)``, built on the layer's worker and never on the driver.

    Its weights are drawn from a generator seeded by (pipeline's seed, layer index), so they do
    not depend on where the model is cut.
    """

    def __init__(self, cls: Any, *args: Any, **kwargs: Any) -> None:
        self.cls = cls
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
        return f"LayerSpec({getattr(self.cls, '__name__', self.cls)}, {', '.join(given)})"


Layer = nn.Module | LayerSpec


def named_layers(model: nn.Sequential | Sequence[Layer]) -> OrderedDict[str, Layer]:
    """The model's layers by the names they have in the unsplit model's ``state_dict``.

    Raises PartitionError for anything but an ``nn.Sequential`` or a sequence of modules and specs.
    """
    if isinstance(model, nn.Sequential):
        return OrderedDict(model.named_children())
    if isinstance(model, nn.Module) or not isinstance(model, Sequence):
        raise PartitionError(
            f"model must be an nn.Sequential or a list of nn.Module / rp.LayerSpec, not {type(model).__name__};"
            " write its forward as a chain of layers"
        )
    for index, layer in enumerate(model):
        if not isinstance(layer, Layer):
            raise PartitionError(f"layer {index} is a {type(layer).__name__}, not an nn.Module or rp.LayerSpec")
    return OrderedDict((str(index), layer) for index, layer in enumerate(model))


def build(layer: Layer, *, seed: int, index: int) -> nn.Module:
    """The module itself: built where this is called if it is a spec, as it is otherwise."""
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


def shared_parameters(layers: OrderedDict[str, Layer], cut: Sequence[int]) -> str | None:
    """Two names of one parameter that ``cut`` would put on different stages, or None."""
    owner: dict[int, tuple[int, str]] = {}
    stage_of = [stage for stage, size in enumerate(cut) for _ in range(size)]
    for stage, (name, layer) in zip(stage_of, layers.items(), strict=True):
        if isinstance(layer, nn.Module):
            for key, parameter in layer.named_parameters():
                first = owner.setdefault(id(parameter), (stage, f"{name}.{key}"))
                if first[0] != stage:
                    return f"{first[1]} and {name}.{key}"
    return None
