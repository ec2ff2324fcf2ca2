"""Pickle messages, and make tensors fit to be sent in them."""

from __future__ import annotations

import copyreg
import io
import pickle
from typing import Any, TypeVar

import torch
from torch import nn

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


class TensorsAside(MessagePickler):
    """Pickles messages but for their ``tensors``, in whose place is what ``aside`` returns, a call to be pickled."""

    def __init__(self, buffer: io.BytesIO) -> None:
        super().__init__(buffer, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[torch.Tensor] = []
        self.dispatch_table = {**copyreg.dispatch_table, torch.Tensor: self.aside, nn.Parameter: self.aside}

    def aside(self, tensor: torch.Tensor) -> tuple[Any, tuple[Any, ...]]:
        """Return a function and its arguments that yield the tensor where the message is unpickled."""
        raise NotImplementedError


def in_bounds(value: T) -> T:
    """Return ``value``; an empty tensor that begins behind the end of its memory, at which torch RPC aborts, is copied.

    A chunk of an empty tensor has such an offset; the receiver checks it against what is sent of the memory.
    """
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or value.is_nested or value.numel():
        return value
    return value.clone() if value.storage_offset() else value  # type: ignore[return-value]
