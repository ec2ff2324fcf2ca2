"""The type of nests; containers that torch's pytree does not know; objects that hold tensors where nobody looks.

A dataclass, a namespace, a subclass of dict or list, ... is registered with torch's pytree when the first one is seen,
as a node whose children are its items and attributes. Both ends of a link see it, so both register it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import inspect
import io
import pickle
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import NoneType, SimpleNamespace
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias

import cloudpickle
import torch
from torch import nn
from torch.utils import _pytree as pytree

from rpcpipe.errors import ModelError


class Dataclass(Protocol):
    """An instance of a dataclass, as type checkers know it."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


class StandIn:
    """What stands in a nest for values: a base of ``Replicated``, ``Batched``, ``MicroBatches`` and ``RemoteValue``."""


# What users give: batches and samples. What they get back, outputs and gradients, is typed Any: which of these it is,
# the model decides, and of a union every user would have to choose by a cast. A container of a class that is registered
# with torch's pytree and is none of these needs a cast.
NestOfTensors: TypeAlias = (
    torch.Tensor
    | StandIn
    | bool
    | complex  # float and int as well
    | str
    | bytes
    | Dataclass
    | SimpleNamespace
    | Mapping[Any, "NestOfTensors"]
    | Sequence["NestOfTensors"]
    | None
)
# What pipelines train on and evaluate: pairs (inputs, targets).
Batches: TypeAlias = Iterable[tuple[NestOfTensors, NestOfTensors]]

_PLAIN = (NoneType, bool, int, float, complex, str, bytes, range, slice, torch.Size, torch.dtype, torch.device)
# Types of values that are sent as they are.
plain: set[type] = {torch.Tensor, nn.Parameter, *_PLAIN}
# Types that are leaves of a nest: those above and the objects that were seen.
leaf_types: set[type] = set(plain)

_BASES = (collections.OrderedDict, dict, list, tuple)
_CONTAINERS = (*_BASES, SimpleNamespace, collections.UserDict, collections.UserList)
_HEAP_TYPE = 1 << 9  # among a class's __flags__: it was made by a class statement
_lock = threading.Lock()


def register(classes: Collection[type]) -> bool:
    """Make those of ``classes`` that are containers known to torch's pytree; return whether there were any."""
    with _lock:
        found = [cls for cls in classes if _is_container(cls)]
        for cls in found:
            if cls not in pytree.SUPPORTED_NODES:  # another thread may have been quicker
                pytree.register_pytree_node(cls, _flatten, functools.partial(_unflatten, cls))
        leaf_types.update(cls for cls in classes if cls not in found)
        return bool(found)


def _is_container(cls: type) -> bool:
    if cls in leaf_types or issubclass(cls, (nn.Module, torch.Tensor, type)):
        return False
    return dataclasses.is_dataclass(cls) or hasattr(cls, "__attrs_attrs__") or issubclass(cls, _CONTAINERS)


class _Shape(NamedTuple):
    """What a container is made of beside its children.

    ``keys`` of a dict, None for a sequence. ``attributes``: names of the attributes among the children. ``mirrored``:
    of those that are a dict's items as well; ``itself``: the dict is its own ``__dict__``.
    """

    keys: list[Any] | None
    length: int
    attributes: list[str]
    mirrored: list[str]
    itself: bool
    default_factory: Any


def _flatten(value: Any) -> tuple[list[Any], _Shape]:
    base = _base(type(value))
    items = dict(base.items(value)) if base is not None and issubclass(base, dict) else {}
    keys = list(items) if base is not None and issubclass(base, dict) else None
    children = list(items.values()) if keys is not None or base is None else list(base.__iter__(value))
    own = getattr(value, "__dict__", {})
    attributes = {} if own is value else {**_slots(value), **own}
    mirrored = [name for name, attribute in attributes.items() if name in items and items[name] is attribute]
    names = [name for name in attributes if name not in mirrored]
    factory = value.default_factory if isinstance(value, collections.defaultdict) else None
    shape = _Shape(keys, len(children), names, mirrored, own is value, factory)
    return [*children, *(attributes[name] for name in names)], shape


def _unflatten(cls: type, children: Iterable[Any], shape: _Shape) -> Any:
    parts, base = list(children), _base(cls)
    items, attributes = parts[: shape.length], parts[shape.length :]
    builtin: Any = next(parent for parent in cls.__mro__ if not parent.__flags__ & _HEAP_TYPE)
    value = builtin.__new__(cls, items) if base is tuple else builtin.__new__(cls)
    if shape.itself:
        value.__dict__ = value
    if isinstance(value, collections.defaultdict):
        value.default_factory = shape.default_factory
    for key, item in zip(shape.keys or (), items if shape.keys else (), strict=True):
        base.__setitem__(value, key, item)
    if base is list:
        list.extend(value, items)
    for name, attribute in zip(shape.attributes, attributes, strict=True):
        object.__setattr__(value, name, attribute)
    for name in shape.mirrored:
        object.__setattr__(value, name, base.__getitem__(value, name))
    return value


def _base(cls: type) -> Any:
    """Return the builtin container whose items ``cls`` has; None for a class with attributes alone."""
    if issubclass(cls, collections.defaultdict):
        return collections.defaultdict
    return next((base for base in _BASES if issubclass(cls, base)), None)


def _slots(value: Any) -> dict[str, Any]:
    """Return the attributes of ``value`` that have slots."""
    found = {}
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            name = f"_{cls.__name__.lstrip('_')}{slot}" if slot.startswith("__") and not slot.endswith("__") else slot
            if slot not in ("__dict__", "__weakref__") and hasattr(value, name):
                found[name] = getattr(value, name)
    return found


class _Held(Exception):
    """The object that was looked for was found."""


class _Finder(cloudpickle.Pickler):  # type: ignore[misc]
    """Walks all that would be sent of an object; raises _Held at a part that is ``wanted``."""

    def __init__(self, wanted: Callable[[Any], bool]) -> None:
        super().__init__(io.BytesIO())
        self._wanted = wanted

    def persistent_id(self, value: Any) -> None:
        if self._wanted(value):
            raise _Held(value)


def check_leaf(leaf: Any, source: str) -> None:
    """Raise ModelError if ``leaf``, neither tensor nor plain value, holds a tensor or cannot be sent.

    The tensor would be sent without its gradient. ``source`` names who gives the leaf.
    """
    name = type(leaf).__qualname__
    try:
        _Finder(lambda part: isinstance(part, (torch.Tensor, torch.UntypedStorage))).dump(leaf)
        pickle.dumps(leaf)  # as messages do: no function that is not found by its name
    except _Held:
        raise ModelError(
            f"{source} holds tensors inside of a {name}, where their gradients would be lost; give them in tuples,"
            f" lists, dicts, dataclasses or namespaces, or register {name} with torch.utils._pytree"
        ) from None
    except Exception as error:
        raise ModelError(
            f"{source} has a {name}, which cannot be sent to another process ({type(error).__name__}: {error});"
            " give tensors and plain values only"
        ) from error


def trainable(function: Callable[..., Any]) -> str | None:
    """Return what ``function`` refers to that training changes, a module or a parameter; None if nothing."""
    inner = getattr(function, "func", function)  # of a functools.partial
    if inspect.isfunction(inner):  # pickled by name, it would not be walked
        variables = inspect.getclosurevars(inner)
        for name, value in {**variables.globals, **variables.nonlocals}.items():
            if _trains(value):
                return f"{name}, a {type(value).__name__}"
    try:
        _Finder(_trains).dump(function)
    except _Held as held:
        return f"a {type(held.args[0]).__name__}"
    except Exception:  # what cannot be sent is refused where it is sent
        return None
    return None


def _trains(value: Any) -> bool:
    return isinstance(value, nn.Module) or (isinstance(value, torch.Tensor) and value.requires_grad)


# Every action looks through several nests. pytree takes 10 to 20 times as long as these two for what most nests are.
_TENSORS = frozenset((torch.Tensor, nn.Parameter))


def collect_builtin(nest: Any, found: list[torch.Tensor]) -> bool:
    """Add the tensors of ``nest`` to ``found``, in the order of ``microbatch.flatten``.

    Returns False, with some of them added, unless ``nest`` is made of tuples, lists and dicts (not subclasses), tensors
    and plain values alone.
    """
    kind = type(nest)
    if kind in _TENSORS:
        found.append(nest)
        return True
    if kind is tuple or kind is list or kind is dict:
        return all(collect_builtin(item, found) for item in (nest.values() if kind is dict else nest))
    return kind in plain


def map_builtin(function: Any, nest: Any) -> Any:
    """Return ``nest``, for which ``collect_builtin`` is true, with every tensor replaced by ``function(tensor)``."""
    kind = type(nest)
    if kind in _TENSORS:
        return function(nest)
    if kind is tuple:
        return tuple([map_builtin(function, item) for item in nest])
    if kind is list:
        return [map_builtin(function, item) for item in nest]
    if kind is dict:
        return {key: map_builtin(function, item) for key, item in nest.items()}
    return nest
