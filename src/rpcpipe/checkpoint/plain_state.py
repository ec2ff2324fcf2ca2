"""Encode state made of plain values and tensors as JSON and a dict of tensors, and decode it bit for bit.

A value of a type that JSON lacks becomes an object with one key that begins with "$". Nothing is pickled.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Mapping
from typing import Any, Protocol

import torch

from rpcpipe.errors import CheckpointError

# Values are nested less deeply, so that reading, writing and sending them stays within Python's limit.
_DEEPEST = 50
# Python writes no longer numbers as text (bits).
_LONGEST = 10_000


def encode(value: Any, path: str, tensors: dict[str, torch.Tensor], depth: int = 0) -> Any:
    """Return JSON for ``value``; add its tensors to ``tensors`` under names that begin with ``path``.

    Raises CheckpointError for anything but None, bool, int, float, str, tensors, and lists, tuples,
    dicts and Counters of them, at most 50 in each other; ``depth``: in how many ``value`` is.
    """
    if depth > _DEEPEST or (isinstance(value, int) and value.bit_length() > _LONGEST):
        what = (
            "a number of that many digits" if isinstance(value, int) else f"more than {_DEEPEST} values in each other"
        )
        raise CheckpointError(f"{path:.100} is {what}, which a checkpoint does not hold")
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, torch.Tensor):
        tensors[path] = value
        return {"$tensor": path}
    if type(value) in (list, tuple):
        items = [encode(item, f"{path}/{index}", tensors, depth + 1) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if type(value) not in (dict, OrderedDict, Counter):
        raise CheckpointError(f"{path} is a {type(value).__name__}: a checkpoint holds plain values and tensors only")
    if not isinstance(value, Counter) and all(isinstance(key, str) and not key.startswith("$") for key in value):
        return {key: encode(item, f"{path}/{key}", tensors, depth + 1) for key, item in value.items()}
    pairs = [
        [encode(part, f"{path}/{at}", tensors, depth + 1) for part, at in ((key, f"key {index}"), (item, key))]
        for index, (key, item) in enumerate(value.items())
    ]
    return {"$counter" if isinstance(value, Counter) else "$dict": pairs}


def decode(value: Any, tensor: Callable[[str], torch.Tensor]) -> Any:
    """Return the value that ``encode`` has encoded as ``value``; ``tensor(name)`` returns its tensors."""
    if isinstance(value, list):
        return [decode(item, tensor) for item in value]
    if not isinstance(value, dict):
        return value
    tag: str = next(iter(value), "")
    content: Any = value.get(tag)
    if tag == "$float":
        return float(content)
    if tag == "$tensor":
        return tensor(content)
    if tag == "$tuple":
        return tuple(decode(content, tensor))
    if tag in ("$dict", "$counter"):
        pairs = {decode(key, tensor): decode(item, tensor) for key, item in content}
        return pairs if tag == "$dict" else Counter(pairs)
    return {key: decode(item, tensor) for key, item in value.items()}


_FLOATS = ("nan", "inf", "-inf")


def check_encoded(value: Any, path: str, tensors: Container[str], depth: int = 0, *, hashable: bool = False) -> None:
    """Raise CheckpointError with the place under ``path`` where ``value`` is not what ``encode`` returns.

    ``tensors``: the names of those that are stored. ``depth``: as of ``encode``. ``hashable``: for the key of a dict.
    """
    if depth > _DEEPEST + 1:
        raise CheckpointError(f"{path:.100} is nested too deeply")
    if isinstance(value, list) and not hashable:
        for index, item in enumerate(value):
            check_encoded(item, f"{path}/{index}", tensors, depth + 1)
    elif isinstance(value, (list, dict)):
        tag = next((key for key in value if isinstance(key, str) and key.startswith("$")), "")
        if isinstance(value, dict) and tag and len(value) == 1:
            _check_tagged(tag, value[tag], path, tensors, depth, hashable)
        elif isinstance(value, dict) and not tag and not hashable:
            for key, item in value.items():
                check_encoded(item, f"{path}/{key}", tensors, depth + 1)
        else:
            raise CheckpointError(f"{path} is {value!r:.80}, which rpcpipe does not write")


def _check_tagged(tag: str, content: Any, path: str, tensors: Container[str], depth: int, hashable: bool) -> None:
    """Check the ``content`` of an object with the one key ``tag``."""
    fine = False
    if tag == "$float":
        fine = content in _FLOATS
    elif tag == "$tensor":
        fine = not hashable and isinstance(content, str) and content in tensors
    elif tag == "$tuple" and isinstance(content, list):
        fine = True
        for index, item in enumerate(content):
            check_encoded(item, f"{path}/{index}", tensors, depth + 1, hashable=hashable)
    elif tag in ("$dict", "$counter") and isinstance(content, list) and not hashable:
        fine = all(isinstance(pair, list) and len(pair) == 2 for pair in content)
        for key, item in content if fine else ():
            check_encoded(key, f"{path}/key", tensors, depth + 1, hashable=True)
            check_encoded(item, f"{path}/{key}", tensors, depth + 1)
            fine = fine and (tag == "$dict" or isinstance(item, (int, float)))
    if not fine:
        raise CheckpointError(f"{path} is {tag} of {content!r:.80}, which rpcpipe does not write")


class HasState(Protocol):
    """An object like torch's schedulers, optimizers, modules and stateful data loaders."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


Stateful = HasState | torch.Generator
Holders = Mapping[str, Stateful]
