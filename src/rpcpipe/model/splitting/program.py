"""Operations of a recorded forward, and their evaluation: what a layer made by ``split`` runs.

An operation's arguments are nests of plain values and of the stand-ins below, in tuples, lists, dicts, slices and
dataclasses.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from rpcpipe.errors import ModelError


class Ref(NamedTuple):
    """The part at ``path`` of what operation ``op`` returns; operation 0 returns the inputs."""

    op: int
    path: tuple[Any, ...] = ()


class State(NamedTuple):
    """The parameter or buffer called ``name`` in the model."""

    name: str


class ByMode(NamedTuple):
    """``training`` or ``evaluation``: a plain value that depends on the mode of the module at ``path``."""

    path: str
    training: Any
    evaluation: Any


class Device(NamedTuple):
    """The device on which the layer runs; it was the sample's when the forward was recorded."""


@dataclass
class Operation:
    """One call of a forward: of a submodule, of a function, or a check that a size is as it was for the sample.

    ``target``: the submodule's path, or the function. ``scopes``: paths of the modules whose forwards made the call,
    from the outside in; ``place``: file and line there. ``without_grad``: it ran under ``torch.no_grad``. ``number``:
    it returns numbers alone. ``outcome`` and ``operands``: of a check, what it gave, and the numbers it compared.
    """

    kind: str  # "module", "function", "check" or "fixed", a check that a number is what Python's own code was given
    target: Any
    args: Any
    kwargs: Any
    scopes: tuple[str, ...]
    place: str
    without_grad: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def number(self) -> bool:
        """Whether it returns numbers alone."""
        return bool(self.facts.get("number"))

    @property
    def settled(self) -> bool:
        """Whether its result depends on sizes alone, neither on values nor on random numbers."""
        return bool(self.facts.get("settled"))

    @property
    def checks(self) -> bool:
        """Whether it is a check."""
        return self.kind in ("check", "fixed")


_STAND_INS = frozenset((Ref, State, ByMode, Device))
_ATOMS = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device))  # most of what calls are passed


def items(nest: Any) -> list[tuple[Any, Any]] | None:
    """Return (key, part) of a container that calls may have as an argument or return; None of anything else."""
    if isinstance(nest, Mapping):
        return list(nest.items())
    if isinstance(nest, (tuple, list)):
        return list(enumerate(nest))
    if dataclasses.is_dataclass(nest) and not isinstance(nest, type):
        return [(entry.name, getattr(nest, entry.name)) for entry in dataclasses.fields(nest)]
    return None


def rebuilt(nest: Any, function: Callable[[Any, Any], Any]) -> Any:
    """Return the container ``nest`` with ``function(key, part)`` in place of every part."""
    if isinstance(nest, Mapping):
        made = {key: function(key, part) for key, part in nest.items()}
        return made if type(nest) is dict else type(nest)(made)  # type: ignore[call-arg]
    if isinstance(nest, (tuple, list)):
        parts = [function(key, part) for key, part in enumerate(nest)]
        if isinstance(nest, tuple) and hasattr(nest, "_fields"):
            return type(nest)(*parts)
        kind = type(nest)
        return kind(parts) if kind in (tuple, list) or hasattr(kind, "n_fields") else _plain(nest, parts)
    return dataclasses.replace(nest, **{key: function(key, part) for key, part in items(nest) or ()})


def _plain(nest: Any, parts: list[Any]) -> Any:
    return tuple(parts) if isinstance(nest, tuple) else parts


def stand_ins(nest: Any) -> Iterator[Any]:
    """Yield the stand-ins in ``nest``."""
    if isinstance(nest, (Ref, State, ByMode, Device)):
        yield nest
    elif isinstance(nest, slice):
        yield from stand_ins((nest.start, nest.stop, nest.step))
    else:
        for _, part in items(nest) or ():
            yield from stand_ins(part)


def replaced(nest: Any, function: Callable[[Any], Any]) -> Any:
    """Return ``nest`` with ``function(stand_in)`` in place of every stand-in."""
    kind = type(nest)
    if kind in _STAND_INS:
        return function(nest)
    if kind in _ATOMS:
        return nest
    if kind is tuple:
        return tuple([replaced(part, function) for part in nest])
    if kind is dict:
        return {key: replaced(part, function) for key, part in nest.items()}
    if kind is slice:
        return slice(*(replaced(part, function) for part in (nest.start, nest.stop, nest.step)))
    return nest if items(nest) is None else rebuilt(nest, lambda _, part: replaced(part, function))


def part_at(nest: Any, path: tuple[Any, ...]) -> Any:
    """Return the part of ``nest`` at ``path``."""
    for key in path:
        by_name = isinstance(key, str) and not isinstance(nest, Mapping)
        nest = getattr(nest, key) if by_name else nest[key]
    return nest


class Getter:
    """Returns an attribute of a tensor, whose own descriptor cannot be pickled."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, tensor: torch.Tensor) -> Any:
        return getattr(tensor, self.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Getter) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return self.name


def size(tensor: torch.Tensor, dim: int) -> int:
    """Return one size of ``tensor``."""
    return tensor.shape[dim]


def set_item(tensor: torch.Tensor, index: Any, value: Any) -> torch.Tensor:
    """Return ``tensor`` after ``tensor[index] = value``."""
    tensor[index] = value
    return tensor


_SIGNS = {
    operator.eq: "==", operator.ne: "!=", operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.ge: ">=",
}  # fmt: skip


def check(operation: Operation, args: Any, kwargs: Any) -> None:
    """Raise ModelError unless a size, or another property of a tensor, is what it was for the sample."""
    now, then = operation.target(*args, **kwargs), operation.facts["outcome"]
    if now == then:
        return
    if operation.kind == "fixed":
        what = f"a size that is {args[0]} here was {args[1]}"
    elif operation.target in _SIGNS:
        a, b = operation.facts["operands"]
        what = f"{args[0]} {_SIGNS[operation.target]} {args[1]} is {now} here, and was {then} of {a} and {b}"
    else:
        what = f"{name_of(operation.target)} of a tensor is {now} here and was {then}"
    raise ModelError(
        f"{operation.place}: {what} for the sample with which the model was split, and its forward may do something"
        f" else now; split it with a sample like these inputs{_otherwise(now)}"
    )


def _otherwise(now: Any) -> str:
    return ", or under the same torch.autocast" if isinstance(now, torch.dtype) else ", or pad them to its shape"


def name_of(function: Any) -> str:
    """Return a short name of a recorded function."""
    owner = getattr(function, "__self__", None)
    if isinstance(owner, type) and getattr(function, "__name__", "") == "apply":
        return owner.__name__
    return str(getattr(function, "__name__", None) or getattr(function, "name", type(function).__name__)).strip("_")
