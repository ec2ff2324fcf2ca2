"""Check the kinds of arguments. Every error is an ArgumentError with the argument, its value and what it takes.

A value is put into words only where it is refused: a list of batches, or a state_dict, takes seconds.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from rpcpipe.errors import ArgumentError, real, require, require_positive, require_whole, shown

# A wait that is longer is no wait; what waits takes no more (seconds: three years).
_LONGEST = 1e8


def _refused(name: str, takes: str, value: Any) -> ArgumentError:
    return ArgumentError(f"{name} must be {takes}, not {shown(value)}")


def require_number(name: str, value: Any, least: float = -math.inf, otherwise: str = "") -> float:
    """Return argument ``name`` as a float; raises ArgumentError unless it is a finite number of at least ``least``."""
    bound = "" if least == -math.inf else f" of at least {least:g}"
    number = real(value)
    require(
        number is not None and math.isfinite(number) and number >= least,
        f"{name} must be a finite number{bound}{otherwise}, not {shown(value)}",
    )
    return number or 0.0


def require_seconds(name: str, value: Any) -> float:
    """Return argument ``name`` as a float; raises ArgumentError unless it is above 0 and at most 1e8 seconds."""
    seconds = require_positive(name, value, " (seconds)")
    require(seconds <= _LONGEST, f"{name} must be at most {_LONGEST:.0e} (seconds), not {shown(value)}")
    return seconds


def require_count(name: str, value: Any, most: int, least: int = 1) -> int:
    """Return argument ``name`` as an int; raises ArgumentError unless it is a whole number in these bounds."""
    count = require_whole(name, value, least)
    require(count <= most, f"{name} must be at most {most}, not {count}")
    return count


def require_flag(name: str, value: Any) -> bool:
    """Return argument ``name``; raises ArgumentError unless it is True or False."""
    if not isinstance(value, bool):
        raise _refused(name, "True or False", value)
    return value


def require_callable(name: str, value: Any, purpose: str = "") -> None:
    """Raise ArgumentError unless argument ``name`` can be called; ``purpose``: as what, such as ``as f(x)``."""
    if not callable(value):
        raise _refused(name, f"a function{' ' * bool(purpose)}{purpose}", value)


def require_path(name: str, value: Any, otherwise: str = "") -> Path:
    """Return argument ``name`` as a path; raises ArgumentError unless it is a string or an os.PathLike of one."""
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(path, str) or path == "" or "\0" in path:
        raise _refused(name, f"a path, as a string or a pathlib.Path{otherwise}", value)
    return Path(path)


def require_iterable(name: str, value: Any, of: str) -> None:
    """Raise ArgumentError unless argument ``name`` can be iterated over, and is no string; ``of``: what it gives."""
    if isinstance(value, (str, bytes)):
        raise _refused(name, f"an iterable of {of}", value)
    try:
        iter(value)
    except TypeError as error:
        raise _refused(name, f"an iterable of {of}", value) from error


def require_numbers(name: str, value: Any) -> list[float]:
    """Return argument ``name`` as a list of floats; raises ArgumentError unless it gives numbers, or scalar tensors."""
    require_iterable(name, value, "numbers, or None")
    entries = list(value)
    found = [number for one in entries if (number := real(one.item() if hasattr(one, "item") else one)) is not None]
    if len(found) < len(entries):
        raise _refused(name, "a list of numbers, or None", value)
    return found


def require_kind(name: str, value: Any, kind: type | tuple[type, ...], what: str) -> None:
    """Raise ArgumentError unless argument ``name`` is of a ``kind``; ``what``: that in words."""
    if not isinstance(value, kind):
        raise _refused(name, what, value)


def require_functions(name: str, value: Any, purpose: str) -> None:
    """Raise ArgumentError unless argument ``name`` is a dict of functions by name; ``purpose``: as what."""
    require_kind(name, value, Mapping, f"a dict of functions by name, each {purpose}")
    for key, function in value.items():
        require(isinstance(key, str), f"the names in {name} must be strings, not {shown(key)}")
        require_callable(f"{name}[{key!r}]", function, purpose)


def require_entries(name: str, value: Any, known: Collection[Any]) -> None:
    """Raise ArgumentError unless argument ``name`` is a list of one or more of the ``known`` values."""
    fine = isinstance(value, Iterable) and not isinstance(value, (str, bytes))
    entries = list(value) if fine else []
    fine = bool(entries) and all(entry in known for entry in entries)
    if not fine:
        raise _refused(name, f"a list of some of {', '.join(map(repr, known))}", value)


def require_names(name: str, value: Any) -> tuple[str, ...]:
    """Return argument ``name``, one string or a list of them, as a tuple; raises ArgumentError for anything else."""
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (None,)
    if not all(isinstance(one, str) for one in names):
        raise _refused(name, "a name or a list of names", value)
    return names
