"""Refuse what a container of layers does beside calling them, and find the memory that layers share.

The layers go to workers; the container, and what this process's torch does to every module, stay here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from rpcpipe.errors import ModelError
from rpcpipe.model.memory import extent
from rpcpipe.model.names import full_name

_METHODS = (
    "__call__", "_call_impl", "state_dict", "load_state_dict", "get_extra_state",
    "set_extra_state", "parameters", "named_parameters", "buffers", "named_buffers", "requires_grad_",
)  # fmt: skip
# What a module that is no chain of layers may have of its own; the layers' modes are those that its modules have.
_OF_CHAINS = ("forward", "__iter__", "train", "eval")
_HOOKS = (
    "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
_GLOBAL_HOOKS = (
    "_global_forward_pre_hooks", "_global_forward_hooks", "_global_backward_pre_hooks", "_global_backward_hooks",
    "_global_buffer_registration_hooks", "_global_module_registration_hooks", "_global_parameter_registration_hooks",
)  # fmt: skip


def check_container(model: nn.Sequential, base: type[nn.Sequential]) -> None:
    """Raise ModelError if ``model`` is more than a ``base``: its layers alone would compute something else."""
    kind = type(model).__name__
    if extra := next(_extras(model, base), None):
        raise ModelError(
            f"the model, a {kind}, has {extra}, which its layers, each on its worker, do not; give that to one of the"
            f" layers, or pass the {kind} as one layer of a list: rp.Pipeline([…, model, …], …)"
        )


def _extras(model: nn.Sequential, base: type[nn.Sequential]) -> Iterator[str]:
    for name in _OF_CHAINS:
        if _overrides(model, name, base):
            yield f"its own {name}()"
    yield from beside_forward(model, base)
    for what, tensors in ("parameter", model.named_parameters), ("buffer", model.named_buffers):
        for name, _ in tensors(recurse=False):
            yield f"a {what} of its own, {name!r}"


def beside_forward(model: nn.Module, base: type[nn.Module] = nn.Module) -> Iterator[str]:
    """Yield what ``model`` has beside its forward and its parts that a ``base`` has not, in words."""
    if parametrize.is_parametrized(model):
        yield "parametrizations of its own"
    for name in _METHODS:
        if _overrides(model, name, base):
            yield f"its own {name}()"
    for name in _HOOKS:
        if getattr(model, name):
            yield f"hooks of its own ({name.strip('_').replace('_', ' ')})"
    if vars(model).get("_compiled_call_impl") is not None:
        yield "been compiled by its compile()"


def _overrides(model: nn.Module, name: str, base: type[nn.Module]) -> bool:
    return name in vars(model) or getattr(type(model), name, None) is not getattr(base, name, None)


def check_global_hooks() -> None:
    """Raise ModelError for hooks on all modules of this process, which workers do not have."""
    for name in _GLOBAL_HOOKS:
        if getattr(torch_module, name):
            raise ModelError(
                f"this process has hooks on all modules ({name.strip('_').replace('_', ' ')}), which do not run on"
                " workers; remove them, and register them on the layers, or on the workers by cluster.call"
            )


class _Place:
    """A layer's tensor: which one, and the bytes of memory in which it lies."""

    def __init__(self, layer: str, path: str, tensor: torch.Tensor) -> None:
        self.layer, self.path, self.tensor = layer, path, tensor
        self.storage = tensor.untyped_storage().data_ptr()
        self.start, self.stop = extent(tensor)

    @property
    def name(self) -> str:
        return full_name(self.layer, self.path)

    @property
    def trained(self) -> bool:
        return isinstance(self.tensor, nn.Parameter)


def shared_buffers(layers: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return by layer the buffers whose memory another layer has too, so that no forward may change them.

    ``layers``: modules, and specs, which share none. Raises ModelError for memory that is known to change: that of
    two parameters which are not one, of a parameter and a buffer, and of a normalization's running statistics.
    """
    found = dict[str, list[str]]()
    for one, other in _overlapping(layers):
        if one.trained or other.trained:
            raise ModelError(
                f"{one.name} and {other.name} lie in the same memory and are not the same parameter, so an update on"
                " one stage would not be seen on the other; let both layers have one nn.Parameter, or copies of it"
            )
        for place in (one, other):
            owner = layers[place.layer].get_submodule(place.path.rpartition(".")[0])
            if hasattr(owner, "num_batches_tracked"):
                raise ModelError(
                    f"{one.name} and {other.name} are one buffer, running statistics that each stage would change for"
                    f" itself; give the layers {one.layer} and {other.layer} a {type(owner).__name__} each"
                )
            if place.path not in found.setdefault(place.layer, []):
                found[place.layer].append(place.path)
    return found


def _overlapping(layers: Mapping[str, Any]) -> Iterator[tuple[_Place, _Place]]:
    """Yield pairs of tensors of different layers that share memory, but for one parameter of several layers."""
    places = sorted(_places(layers), key=lambda place: (place.storage, place.start))
    reaching: list[_Place] = []
    for place in places:
        reaching = [one for one in reaching if one.storage == place.storage and one.stop > place.start]
        for one in reaching:
            if one.layer != place.layer and not (one.trained and one.tensor is place.tensor):
                yield one, place
        reaching.append(place)


def _places(layers: Mapping[str, Any]) -> Iterator[_Place]:
    for name, layer in layers.items():
        if isinstance(layer, nn.Module):
            for path, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
                uninitialized = nn.parameter.is_lazy(tensor)
                if (
                    not uninitialized
                    and tensor.layout == torch.strided
                    and tensor.device.type != "meta"
                    and tensor.numel()
                ):
                    yield _Place(name, path, tensor)
