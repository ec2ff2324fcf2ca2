"""The forward of a model of transformers, run without the model's blocks.

What a block is called with (masks, rotary angles, position ids) is made by the model's own forward, and so is what
happens before the first block and behind the last. A skeleton is the model with zeros for weights, which take no
memory, and with stand-ins for the blocks and the modules behind them. Each worker has one; its stages' layers run it
up to the place where they belong.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rpcpipe.model.hf.decoding import Decodings
from rpcpipe.model.hf.recipe import Recipe, initialize, without_values

# Called in place of a module with (args, kwargs) of its forward.
Handler = Callable[[tuple[Any, ...], dict[str, Any]], Any]


class Reached(Exception):
    """Ends a forward early: what the caller wanted of it is known."""

    def __init__(self, value: Any = None) -> None:
        super().__init__()
        self.value = value


class StandIn(nn.Module):
    """Stands for ``original`` in a skeleton, has its attributes, and is called as the skeleton's handler says."""

    def __init__(self, path: str, original: nn.Module, handlers: Mapping[str, Handler]) -> None:
        super().__init__()
        self.path = path
        self.handlers = handlers
        vars(self)["original"] = original  # no submodule: its parameters are not the skeleton's

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.handlers[self.path](args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["original"], name)


class Skeleton:
    """The model of ``recipe`` without weights, whose modules at ``paths`` are stand-ins."""

    def __init__(self, recipe: Recipe, paths: Sequence[str], device: torch.device, *, needs_grad: bool = False) -> None:
        self.recipe = recipe
        full = recipe.weightless()
        self._templates = {path: full.get_submodule(path) for path in paths}
        self._handlers: dict[str, Handler] = {}
        for path in paths:
            self._put(full, path, nn.Module())
        self._pristine = full
        self.model = copy.deepcopy(full)
        without_values(self.model, device, needs_grad=needs_grad)
        for path, template in self._templates.items():
            self._put(self.model, path, StandIn(path, template, self._handlers))
        self.model.config.use_cache = False
        self._own = list(self.model.modules())
        self.memo: OrderedDict[Any, Any] = OrderedDict()
        self.decodings = Decodings()

    @staticmethod
    def _put(model: nn.Module, path: str, module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent).register_module(name, module)

    def part(self, path: str) -> nn.Module:
        """Return a copy of the module at ``path``, its parameters on the device meta."""
        template = self._templates.get(path)
        return copy.deepcopy(self._pristine.get_submodule(path) if template is None else template)

    def hollow(self, path: str) -> nn.Module:
        """Return a copy of the module at ``path`` on the CPU, in eval mode, with zeros for weights."""
        part = self.part(path)
        without_values(part, torch.device("cpu"), needs_grad=False)
        return part.eval()

    def alone(self, path: str) -> nn.Module:
        """Return the model with the module at ``path`` in it and without the others that are stand-ins."""
        model = copy.deepcopy(self._pristine)
        if path in self._templates:
            self._put(model, path, self.part(path))
        return model

    def initialize(self, module: nn.Module) -> None:
        """Give ``module``, made by ``part``, its initial weights."""
        initialize(module, self._pristine)

    def run(self, handlers: Mapping[str, Handler], training: bool, **inputs: Any) -> Any:
        """Return what the model's forward returns, or the value with which a handler ended it.

        Modules that stand in for the skeleton's own (``having``) keep their modes.
        """
        self._handlers |= handlers
        if self.model.training != training:
            for module in self._own:
                module.training = training
        try:
            return self.model(**inputs)
        except Reached as reached:
            return reached.value
        finally:
            self._handlers.clear()

    @contextmanager
    def having(self, replacements: Mapping[str, nn.Module]) -> Iterator[None]:
        """Let other modules stand at the paths of ``replacements`` inside the block."""
        replaced = {path: self.model.get_submodule(path) for path in replacements}
        try:
            for path, module in replacements.items():
                self._put(self.model, path, module)
            yield
        finally:
            for path, module in replaced.items():
                self._put(self.model, path, module)

    @contextmanager
    def returning(self, path: str, forward: Callable[..., Any] | None) -> Iterator[None]:
        """Let the module at ``path`` have another ``forward`` inside the block, if one is given."""
        module = self.model.get_submodule(path)
        if forward is not None:
            module.forward = forward
        try:
            yield
        finally:
            vars(module).pop("forward", None)


_SKELETONS, _MEMORIES = 4, 2  # of each thread, and of each skeleton: a micro-batch's masks may be large
_kept = threading.local()  # workers of one process compute in threads of their own


def remembered(entries: OrderedDict[Any, Any], key: Any, make: Callable[[], Any], most: int = _MEMORIES) -> Any:
    """Return ``entries[key]``, made by ``make`` if it is not there; of more than ``most`` the oldest is dropped."""
    if key not in entries:
        entries[key] = make()
        while len(entries) > most:
            entries.popitem(last=False)
    entries.move_to_end(key)
    return entries[key]


def skeleton(recipe: Recipe, paths: Sequence[str], device: torch.device) -> Skeleton:
    """Return this thread's skeleton of ``recipe`` on ``device``."""
    entries = vars(_kept).setdefault("skeletons", OrderedDict())
    return remembered(entries, (recipe.key, device), lambda: Skeleton(recipe, paths, device), _SKELETONS)
