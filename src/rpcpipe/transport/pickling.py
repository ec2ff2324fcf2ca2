"""Pickle code by value where the receiver has no module to import it from: scripts and REPLs define such code."""

from __future__ import annotations

import pickle
import warnings
from typing import Any, TypeVar

import cloudpickle
import torch

T = TypeVar("T")

_HEAVY_BYTES = 64 << 20


def dumps(value: Any, what: str) -> bytes:
    """Return ``value`` cloudpickled; warn if it drags along more data than anybody would send on purpose.

    ``what`` names the value in the warning.
    """
    data = bytes(cloudpickle.dumps(value))
    if len(data) > _HEAVY_BYTES:
        warnings.warn(
            f"{what} takes {len(data) / 2**20:.0f} MiB to send: it refers to something large, a global or an enclosing"
            " variable; pass that as an argument, or load it on the worker",
            stacklevel=4,
        )
    return data


loads = pickle.loads


class MessagePickler(pickle.Pickler):
    """Pickles messages: fast, by C, and by value only what ``__main__`` defines, another module on a worker."""

    def reducer_override(self, value: Any) -> Any:
        if type(value).__module__ == "__main__" or getattr(value, "__module__", None) == "__main__":
            return cloudpickle.loads, (cloudpickle.dumps(value),)
        return NotImplemented


def in_bounds(value: T) -> T:
    """Return ``value``; an empty tensor that begins behind the end of its memory, at which torch RPC aborts, is copied.

    A chunk of an empty tensor has such an offset; the receiver checks it against what is sent of the memory.
    """
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or value.is_nested or value.numel():
        return value
    return value.clone() if value.storage_offset() else value  # type: ignore[return-value]
