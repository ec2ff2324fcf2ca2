"""Pickle messages, and make tensors fit to be sent in them."""

from __future__ import annotations

import pickle
from typing import Any, TypeVar

import torch

from rpcpipe.transport import user_pickling
from rpcpipe.transport.user_pickling import loads, worker_imports

T = TypeVar("T")


class MessagePickler(pickle.Pickler):
    """Pickles messages: fast, by C, and by value only what the receiver has no module to import it from."""

    def reducer_override(self, value: Any) -> Any:
        name = getattr(value, "__module__", None)  # an instance has its class's
        if name in worker_imports.by_name or not isinstance(name, str) or worker_imports.find(name):
            return NotImplemented
        return loads, (user_pickling.dumps(value),)


def in_bounds(value: T) -> T:
    """Return ``value``; an empty tensor that begins behind the end of its memory, at which torch RPC aborts, is copied.

    A chunk of an empty tensor has such an offset; the receiver checks it against what is sent of the memory.
    """
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or value.is_nested or value.numel():
        return value
    return value.clone() if value.storage_offset() else value  # type: ignore[return-value]
