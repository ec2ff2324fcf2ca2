"""A model of transformers without its weights: what is needed to build any part of it on the worker that owns it."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rpcpipe.errors import ModelError

_SMALL = 1 << 16  # elements of a parameter that is kept as its constructor made it


@dataclass(frozen=True, eq=False)
class Recipe:
    """A class of transformers, the config of the model, and its dtype if not torch's default.

    ``rounded``: the dtype to which ``model.to`` has converted the buffers since. ``key`` is equal for equal models.
    """

    cls: type[PreTrainedModel]
    config: Any
    dtype: torch.dtype | None
    key: str
    rounded: torch.dtype | None = None

    @classmethod
    def of(
        cls, model_class: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype | None = None
    ) -> Recipe:
        """Return the recipe of ``model_class(config)``; the config is copied."""
        config = copy.deepcopy(config)
        said = f"{model_class.__qualname__}{config.to_json_string(use_diff=False)}{config._attn_implementation}{dtype}"
        return cls(model_class, config, dtype, hashlib.sha256(said.encode()).hexdigest())

    def __deepcopy__(self, memo: dict[int, Any]) -> Recipe:
        return self  # nothing changes it, and every layer of a model has the same one

    def __repr__(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        """The name of the model's class."""
        return self.cls.__name__

    def weightless(self) -> PreTrainedModel:
        """Return the model with parameters on the device meta, but for small ones to which its constructor gave values.

        Its buffers have their values.
        """
        config = copy.deepcopy(self.config)
        with torch.device("cpu"), _WithoutStorage(), _default_dtype(self.dtype):
            model = self.cls(config)
        kept: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, parameter in own_parameters(module):
                if parameter.numel() > _SMALL:
                    module.register_parameter(name, kept.setdefault(id(parameter), _on_meta(parameter)))
            if any(buffer is not None and buffer.is_meta for buffer in module.buffers(recurse=False)):
                _fill_buffers(module)
                model._init_weights(module)
        if self.rounded is not None:
            _round_buffers(model, self.rounded)
        return model

    def with_buffers_in(self, dtype: torch.dtype) -> Recipe:
        """Return the recipe of the model after ``model.to(dtype)``."""
        return replace(self, rounded=dtype, key=f"{self.key} {dtype}")


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Let ``dtype``, if there is one, be torch's default inside the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(before if dtype is None else dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


_INITIALIZERS = (nn.init.__name__, "transformers.initialization")


class _WithoutStorage(TorchFunctionMode):
    """``torch.empty``, of which almost every parameter is made, allocates nothing, and nothing is drawn for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") in _INITIALIZERS and (tensor := kwargs.get("tensor")) is not None:
            return tensor if tensor.is_meta else func(*args, **kwargs)  # milliseconds, even on the device meta
        return func(*args, **{**kwargs, **({"device": "meta"} if func is torch.empty else {})})


def _on_meta(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)


def own_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters that ``module`` itself has, each under all of its names."""
    return list(module.named_parameters(recurse=False, remove_duplicate=False))


def _round_buffers(model: nn.Module, dtype: torch.dtype) -> None:
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_floating_point():
                setattr(module, name, buffer.to(dtype))


def _fill_buffers(module: nn.Module) -> None:
    """Give ``module`` buffers with storage, to be filled by ``_init_weights``."""
    for name, buffer in list(module.named_buffers(recurse=False)):
        if buffer.is_meta:
            setattr(module, name, torch.zeros_like(buffer, device="cpu"))


def without_values(module: nn.Module, device: torch.device, *, needs_grad: bool) -> None:
    """Replace the parameters of ``module`` by zeros that share one element, and move its buffers to ``device``."""
    kept: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in own_parameters(part):
            zero = torch.zeros((), dtype=parameter.dtype, device=device).expand(parameter.shape)
            part.register_parameter(name, kept.setdefault(id(parameter), nn.Parameter(zero, needs_grad)))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, buffer.to(device))


def initialize(module: nn.Module, model: PreTrainedModel) -> None:
    """Give the parameters of ``module``, now without storage, the initial values that ``model``'s class draws.

    Raises ModelError for a parameter that the class leaves as it is.
    """
    kept: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in own_parameters(part):
            if parameter.is_meta:
                blank = torch.full(parameter.shape, torch.nan, dtype=parameter.dtype)
                fresh = nn.Parameter(blank, parameter.requires_grad)
                part.register_parameter(name, kept.setdefault(id(parameter), fresh))
    if any(parameter.is_meta for parameter in module.parameters()):
        return  # a layer that is built for its shapes
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, Conv1D):  # as its constructor does
                nn.init.normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)
            if callable(reset := getattr(part, "reset_parameters", None)):
                reset()  # torch's own values, where transformers has none
        try:
            module.apply(model._init_weights)
        except AttributeError as error:  # it looks for other parts of the model
            raise ModelError(
                f"{type(model).__name__} gives no initial values to a {type(module).__name__} alone ({error}); build"
                " the model and pass the model"
            ) from error
    for name, parameter in module.named_parameters():
        if parameter.isnan().any():
            raise ModelError(
                f"{type(model).__name__} leaves {name} of a {type(module).__name__} without an initial value; build"
                " the model, give it its values and pass the model"
            )
