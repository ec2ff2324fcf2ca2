"""Pickle modules and functions for other processes: what plain pickling loses is carried, or refused.

Everything of the user's that goes to a worker, or from worker to worker, goes through ``dumps``.
"""

from __future__ import annotations

import importlib
import io
import os
import pickle
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib.machinery import BuiltinImporter, FrozenImporter, ModuleSpec, PathFinder
from typing import Any

import cloudpickle
import torch
from torch import nn
from torch.nn.utils import parametrize

from rpcpipe.errors import ArgumentError, RpcPipeError

COMPILED = (
    "module.compile() has compiled a {kind}, and what it made does not travel: let the function compile the layer, too"
)

loads = pickle.loads

_HEAVY_BYTES = 64 << 20


def dumps(value: Any) -> bytes:
    """Return ``value`` cloudpickled, with all that ``Pickler`` adds; raises what pickling raises."""
    with io.BytesIO() as buffer:
        Pickler(buffer).dump(value)
        return buffer.getvalue()


def named_dumps(value: Any, what: str, *, error: type[RpcPipeError] = ArgumentError) -> bytes:
    """Return ``value`` pickled; warn if it drags along more data than anybody would send on purpose.

    ``what`` names the value in the warning, and in the ``error`` for what cannot be pickled.
    """
    try:
        data = dumps(value)
    except Exception as cause:
        raise error(
            f"{what} cannot be pickled to be sent to a worker: {type(cause).__name__}: {cause}; make what it refers to"
            " on the worker, inside the function"
        ) from cause
    if len(data) > _HEAVY_BYTES:
        warnings.warn(
            f"{what} takes {len(data) / 2**20:.0f} MiB to send: it refers to something large, a global or an enclosing"
            " variable; pass that as an argument, or load it on the worker",
            stacklevel=4,
        )
    return data


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """cloudpickle's, which also carries hooks of parameters, parametrized modules and memory that tensors share.

    Classes and functions go by value where a worker cannot import their module by its name. Raises PicklingError for a
    module that ``module.compile()`` has compiled, which torch would send uncompiled. Code keeps its file's name, for
    tracebacks.
    """

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, nn.Module):
            if value.__dict__.get("_compiled_call_impl") is not None:
                raise pickle.PicklingError(COMPILED.format(kind=type(value).__name__))
            if _has_injected_class(value):
                return _reduce_parametrized(value)
        elif isinstance(value, torch.Tensor):
            if any(_hooks(value)):
                return _reduce_hooked(value)
        elif isinstance(value, torch.storage.TypedStorage):
            # Only the storage below is one object for all tensors that lie in it.
            return _typed_storage, (value._untyped_storage, value.dtype)
        elif isinstance(value, torch.UntypedStorage):
            _, (data,) = _typed_storage(value, torch.uint8).__reduce__()  # type: ignore[no-untyped-call]
            return _untyped_storage, (data,)
        elif isinstance(value, types.ModuleType):
            if type(value) is not types.ModuleType and worker_imports.find(value.__name__):
                return importlib.import_module, (value.__name__,)  # torch.backends.cudnn is one
            if (parent := _holder(value)) is not None:
                return getattr, (parent, value.__name__.rpartition(".")[2])
            _register(value.__name__)
        elif isinstance(value, (type, types.FunctionType)):
            _register(value.__module__)
        elif isinstance(value, types.CodeType):
            return _code, (value.co_filename, *self.dispatch_table[types.CodeType](value))
        return super().reducer_override(value)


def _code(filename: str, make: Callable[..., types.CodeType], arguments: tuple[Any, ...]) -> types.CodeType:
    return make(*arguments).replace(co_filename=filename)


def _holder(module: types.ModuleType) -> types.ModuleType | None:
    """Return the module whose attribute ``module`` is, if it cannot be imported itself: torch._C._functions is one."""
    parent, _, name = module.__name__.rpartition(".")
    held = module.__name__ not in sys.modules and getattr(sys.modules.get(parent), name, None) is module
    return sys.modules[parent] if held else None


# --- tensors ---


def _typed_storage(untyped: torch.UntypedStorage, dtype: torch.dtype) -> torch.storage.TypedStorage:
    return torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]


def _untyped_storage(data: bytes) -> torch.UntypedStorage:
    storage: torch.UntypedStorage = torch.storage._load_from_bytes(data)._untyped_storage  # type: ignore[no-untyped-call]
    return storage


def _hooks(tensor: torch.Tensor) -> tuple[list[Any], list[Any]]:
    """Return the hooks of a leaf, before and after accumulation, without those marked as not to be serialized."""
    if not tensor.is_leaf:
        return [], []
    registered: Iterable[Any] = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
    before, after = (
        [hook for hook in (hooks or {}).values() if not hasattr(hook, "__torch_unserializable__")]
        for hooks in registered
    )
    return before, after


def _reduce_hooked(tensor: torch.Tensor) -> tuple[Any, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the hooks are not serialized
        function, arguments, *_ = tensor.__reduce_ex__(pickle.HIGHEST_PROTOCOL)  # type: ignore[no-untyped-call]
    # As its state, because a hook may refer to the tensor, or to the module that holds it.
    return function, arguments, _hooks(tensor), None, None, _register_hooks


def _register_hooks(tensor: torch.Tensor, hooks: tuple[list[Any], list[Any]]) -> None:
    wanted = tensor.requires_grad
    tensor.requires_grad_(True)  # a tensor may have been frozen after its hooks were registered
    before, after = hooks
    for hook in before:
        tensor.register_hook(hook)  # type: ignore[no-untyped-call]
    for hook in after:
        tensor.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    tensor.requires_grad_(wanted)


# --- modules of torch.nn.utils.parametrize, whose classes torch makes for one module each and does not pickle ---


def _has_injected_class(module: nn.Module) -> bool:
    injected = vars(type(module)).get("__getstate__")
    return parametrize.is_parametrized(module) and getattr(injected, "__module__", "") == parametrize.__name__


def _reduce_parametrized(module: nn.Module) -> tuple[Any, ...]:
    original: Any = type(module).__bases__[0]
    names = list(module.parametrizations)  # type: ignore[arg-type]
    return _blank, (original,), (original.__getstate__(module), names), None, None, _parametrize


def _blank(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


def _parametrize(module: nn.Module, state: tuple[dict[str, Any], Sequence[str]]) -> None:
    attributes, names = state
    module.__setstate__(attributes)  # type: ignore[no-untyped-call]
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)


# --- what a worker can import ---


class WorkerImports:
    """What workers find under a module's name. ``path``: their module path; None for one that is like this process's.

    ``by_name``: modules known to be found.
    """

    def __init__(self) -> None:
        self.path: list[str] | None = None
        self.by_name: set[str] = {"builtins"}

    def adopt(self, path: Sequence[str]) -> None:
        """Workers that are started now find modules on ``path``."""
        self.path, self.by_name = [os.path.abspath(entry) for entry in path], {"builtins"}

    def find(self, name: str) -> bool:
        """Return whether a worker that imports ``name`` gets this process's module of that name."""
        if name in self.by_name:
            return True
        found = name != "__main__" and self._search(name, sys.modules.get(name))
        if found:
            self.by_name.add(name)
        return found

    def _search(self, name: str, module: types.ModuleType | None) -> bool:
        parent = name.rpartition(".")[0]
        if parent and not self.find(parent):
            return False
        file, path = getattr(module, "__file__", None), self.path
        if parent:
            path = getattr(sys.modules.get(parent), "__path__", None)
            if module is not None and (file is None or path is None):
                return True  # made in memory, or by C, when its parent is imported
        spec = _spec(name, path)
        return spec is not None and (file is None or not spec.has_location or _same_file(file, str(spec.origin)))


def _spec(name: str, path: Sequence[str] | None) -> ModuleSpec | None:
    """Return where a worker finds ``name``: on ``path``, or where this process's other finders say.

    Python's start makes those (of editable installations, for instance). What this process finds on its own path as
    well is not theirs: a finder that only wraps the search of the path, as pytest's, says nothing of a worker.
    """
    own = BuiltinImporter.find_spec(name, path) or FrozenImporter.find_spec(name, path)
    if (found := own or PathFinder.find_spec(name, path)) is not None or PathFinder.find_spec(name) is not None:
        return found
    for finder in sys.meta_path:
        try:
            found = finder.find_spec(name, path)
        except Exception:  # called out of an import, which not every finder expects
            continue
        if found is not None:
            return found
    return None


worker_imports = WorkerImports()


def _same_file(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _register(name: str | None) -> None:
    """Make cloudpickle send by value what module ``name`` defines, unless a worker can import it."""
    if name is not None and name != "__main__" and name in sys.modules and not worker_imports.find(name):
        cloudpickle.register_pickle_by_value(sys.modules[name])
