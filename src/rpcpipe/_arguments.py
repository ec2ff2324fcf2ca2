"""Check the kinds of arguments. Every error is an ArgumentError with the argument, its value and what it takes."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from rpcpipe.errors import ArgumentError, real, require, require_positive, require_whole, shown

# A wait that is longer is no wait; what waits takes no more (seconds: three years).
_LONGEST = 1e8


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
    require(isinstance(value, bool), f"{name} must be True or False, not {shown(value)}")
    return bool(value)


def require_callable(name: str, value: Any, purpose: str = "") -> None:
    """Raise ArgumentError unless argument ``name`` can be called; ``purpose``: as what, such as ``as f(x)``."""
    require(callable(value), f"{name} must be a function{' ' * bool(purpose)}{purpose}, not {shown(value)}")


def require_path(name: str, value: Any, otherwise: str = "") -> Path:
    """Return argument ``name`` as a path; raises ArgumentError unless it is a string or an os.PathLike of one."""
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    require(
        isinstance(path, str) and path != "" and "\0" not in path,
        f"{name} must be a path, as a string or a pathlib.Path{otherwise}, not {shown(value)}",
    )
    return Path(str(path))


def require_iterable(name: str, value: Any, of: str) -> None:
    """Raise ArgumentError unless argument ``name`` can be iterated over, and is no string; ``of``: what it gives."""
    require(not isinstance(value, (str, bytes)), f"{name} must be an iterable of {of}, not {shown(value)}")
    try:
        iter(value)
    except TypeError as error:
        raise ArgumentError(f"{name} must be an iterable of {of}, not {shown(value)}") from error


def require_kind(name: str, value: Any, kind: type | tuple[type, ...], what: str) -> None:
    """Raise ArgumentError unless argument ``name`` is of a ``kind``; ``what``: that in words."""
    require(isinstance(value, kind), f"{name} must be {what}, not {shown(value)}")


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
    require(fine, f"{name} must be a list of some of {', '.join(map(repr, known))}, not {shown(value)}")


def require_names(name: str, value: Any) -> tuple[str, ...]:
    """Return argument ``name``, one string or a list of them, as a tuple; raises ArgumentError for anything else."""
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (None,)
    require(all(isinstance(one, str) for one in names), f"{name} must be a name or a list of names, not {shown(value)}")
    return names
