"""Pickle messages, and what of the user's goes with them to other processes."""

from __future__ import annotations

import pickle
import warnings
from typing import Any, TypeVar

import torch

from rpcpipe.errors import ArgumentError
from rpcpipe.transport import pickler
from rpcpipe.transport.pickler import loads, worker_imports

__all__ = ["MessagePickler", "dumps", "in_bounds", "loads"]

T = TypeVar("T")

_HEAVY_BYTES = 64 << 20


def dumps(value: Any, what: str) -> bytes:
    """Return ``value`` pickled; warn if it drags along more data than anybody would send on purpose.

    ``what`` names the value in the warning, and in the ArgumentError for what cannot be pickled.
    """
    try:
        data = pickler.dumps(value)
    except Exception as error:
        raise ArgumentError(
            f"{what} cannot be pickled to be sent to a worker: {type(error).__name__}: {error}; make what it refers to"
            " on the worker, inside the function"
        ) from error
    if len(data) > _HEAVY_BYTES:
        warnings.warn(
            f"{what} takes {len(data) / 2**20:.0f} MiB to send: it refers to something large, a global or an enclosing"
            " variable; pass that as an argument, or load it on the worker",
            stacklevel=4,
        )
    return data


class MessagePickler(pickle.Pickler):
    """Pickles messages: fast, by C, and by value only what the receiver has no module to import it from."""

    def reducer_override(self, value: Any) -> Any:
        name = getattr(value, "__module__", None)  # an instance has its class's
        if name in worker_imports.by_name or not isinstance(name, str) or worker_imports.find(name):
            return NotImplemented
        return loads, (pickler.dumps(value),)


def in_bounds(value: T) -> T:
    """Return ``value``; an empty tensor that begins behind the end of its memory, at which torch RPC aborts, is copied.

    A chunk of an empty tensor has such an offset; the receiver checks it against what is sent of the memory.
    """
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or value.is_nested or value.numel():
        return value
    return value.clone() if value.storage_offset() else value  # type: ignore[return-value]
