"""Sizes of tensors while a forward is recorded: numbers that know which operation gives them.

They are subclasses of ``torch.SymInt`` and ``torch.SymFloat``, which every function of torch takes in place of a
number, and all of Python's own code that asks for their value (``range``, ``if``, ``int``) comes by here.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, Protocol

import torch

_NUMBERS = (int, float)
# Python functions that make a number of numbers, by their special method.
_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "truediv": operator.truediv,
    "floordiv": operator.floordiv, "mod": operator.mod, "pow": operator.pow, "lshift": operator.lshift,
    "rshift": operator.rshift, "and": operator.and_, "or": operator.or_, "xor": operator.xor, "divmod": divmod,
}  # fmt: skip
_UNARY: dict[str, Callable[..., Any]] = {
    "neg": operator.neg, "pos": operator.pos, "abs": operator.abs, "invert": operator.invert, "trunc": math.trunc,
    "floor": math.floor, "ceil": math.ceil, "round": round,
}  # fmt: skip
_COMPARISONS: dict[str, Callable[..., Any]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
}  # fmt: skip


class Source(Protocol):
    """What records: of a number's uses it is told."""

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record and return ``function(*args, **kwargs)``."""

    def compare(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Return a comparison of numbers, which must come out so whenever the layers run."""

    def fix(self, number: Number) -> Any:
        """Return the value of a number, which must be that whenever the layers run."""


class Number:
    """A number of the sample's, ``value``; ``ref`` says which operation gives it."""

    source: Source
    ref: Any
    value: Any

    def __bool__(self) -> bool:
        return bool(self.source.compare(operator.ne, (self, 0)))

    def __int__(self) -> int:
        return int(self.source.fix(self))

    def __index__(self) -> int:
        return operator.index(self.source.fix(self))

    def __float__(self) -> float:
        return float(self.source.fix(self))

    def __complex__(self) -> complex:
        return complex(self.source.fix(self))

    def __hash__(self) -> int:
        return hash(self.source.fix(self))

    def __repr__(self) -> str:
        return repr(self.value)

    def __format__(self, spec: str) -> str:
        return format(self.value, spec)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "node":
            raise AttributeError(name)  # torch asks every argument whether it has these
        return getattr(self.source.fix(self), name)  # numerator, bit_length, ...


class Int(Number, torch.SymInt):
    """A whole number."""

    def __init__(self, source: Source, ref: Any, value: int) -> None:
        self.source, self.ref, self.value = source, ref, value


class Float(Number, torch.SymFloat):
    """Another number, computed of whole ones."""

    def __init__(self, source: Source, ref: Any, value: float) -> None:
        self.source, self.ref, self.value = source, ref, value


class Shape(tuple[Any, ...]):
    """In place of a ``torch.Size``, which holds no such numbers."""

    def numel(self) -> Any:
        """Return the product of the sizes."""
        return math.prod(self)


def number(source: Source, ref: Any, value: Any) -> Any:
    """Return ``value`` as a number of the operation ``ref``; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        return value
    return Int(source, ref, value) if isinstance(value, int) else Float(source, ref, value)


def _binary(function: Callable[..., Any], *, reflected: bool = False) -> Callable[..., Any]:
    def method(self: Number, other: Any, *modulo: Any) -> Any:
        if modulo or not isinstance(other, (*_NUMBERS, Number)):
            return NotImplemented
        return self.source.call(function, (other, self) if reflected else (self, other), {})

    return method


def _unary(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *digits: self.source.call(function, (self, *digits), {})


def _comparison(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Number, other: Any) -> Any:
        if not isinstance(other, (*_NUMBERS, Number)):
            return NotImplemented
        return self.source.compare(function, (self, other))

    return method


for _kind in (Int, Float):
    for _name, _function in _ARITHMETIC.items():
        setattr(_kind, f"__{_name}__", _binary(_function))
        setattr(_kind, f"__r{_name}__", _binary(_function, reflected=True))
    for _name, _function in _UNARY.items():
        setattr(_kind, f"__{_name}__", _unary(_function))
    for _name, _function in _COMPARISONS.items():
        setattr(_kind, f"__{_name}__", _comparison(_function))
    setattr(_kind, "__hash__", Number.__hash__)  # noqa: B010  (a class with __eq__ loses it)
