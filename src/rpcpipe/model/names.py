"""Layers by name, and the names of their parameters and buffers in the whole model's ``state_dict``."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from rpcpipe.errors import CheckpointError

# In the name of a layer whose module has its tensors under their whole names: "conv1:relu" has conv1.weight.
FREE = ":"


def full_name(layer: str, key: str) -> str:
    """Return the name in the whole model of what a layer's module calls ``key``."""
    return f"{prefix_of(layer)}{key}"


def prefix_of(layer: str) -> str:
    """Return what the names of a layer's tensors begin with in the whole model."""
    return "" if FREE in layer else f"{layer}."


class Named(nn.Sequential):
    """A chain of layers whose names may contain dots (``bert.encoder.layer.3``), as in the model's ``state_dict``.

    torch reads a dot as a submodule, and ``transformer`` and ``transformer.h.0`` may both be layers, so the
    methods that look up names are overridden.
    """

    def add_module(self, name: str, module: nn.Module | None) -> None:
        assert module is not None
        self._modules[name] = module

    def get_parameter(self, target: str) -> nn.Parameter:
        return dict(self.named_parameters(remove_duplicate=False))[target]

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        memo = set() if memo is None else memo
        if self in memo:
            return
        memo |= {self} if remove_duplicate else set()
        yield prefix, self
        for name, layer in self._modules.items():
            assert layer is not None
            path = full_name(name, "").removesuffix(".")
            yield from layer.named_modules(memo, f"{prefix}.{path}".strip("."), remove_duplicate)

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        destination = OrderedDict() if destination is None else destination
        for name, layer in self.named_children():
            layer.state_dict(destination=destination, prefix=f"{prefix}{prefix_of(name)}", keep_vars=keep_vars)
        return destination

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        live = self.state_dict().keys()
        missing = [key for key in live if key not in state_dict]
        unexpected = [key for key in state_dict if key not in live]
        if strict and (missing or unexpected):
            raise CheckpointError(f"the state does not fit the layers: missing {missing}, unexpected {unexpected}")
        for name, layer in self.named_children():
            names = {key: full_name(name, key) for key in layer.state_dict()}
            part = {key: state_dict[whole] for key, whole in names.items() if whole in state_dict}
            layer.load_state_dict(part, strict=False, assign=assign)
        return _IncompatibleKeys(missing, unexpected)
