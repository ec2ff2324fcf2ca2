"""What autograd keeps of a forward pass: counted, or not kept at all."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks


class Memory:
    """Distinct memory behind tensors: of a storage that several views share, as much as they cover."""

    def __init__(self, tensors: Iterable[torch.Tensor] = ()) -> None:
        self._parts: dict[int, set[tuple[int, int]]] = {}
        self._sizes: dict[int, int] = {}
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage.data_ptr() or storage._cdata  # on the meta device there is no memory
        self._sizes[address] = storage.nbytes()
        self._parts.setdefault(address, set()).add((int(tensor.storage_offset()), tensor.nbytes))

    def without(self, *others: Memory) -> int:
        """Bytes, but for the storages in ``others``."""
        return sum(
            min(self._sizes[address], sum(size for _, size in parts))
            for address, parts in self._parts.items()
            if not any(address in other._parts for other in others)
        )


class Meter:
    """Counts the distinct memory that autograd saves inside the with-block, but for what is in ``known``."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        self._known = Memory(known)
        self.saved = Memory()
        self._hooks: AbstractContextManager[None] = saved_tensors_hooks(self._pack, _same)

    @property
    def bytes(self) -> int:
        return self.saved.without(self._known)

    def beside(self, other: Memory) -> int:
        """``bytes``, but for what is in ``other`` too."""
        return self.saved.without(self._known, other)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.saved.add(tensor)
        # The tensor itself may be an output of the node that saves it: a cycle that is never freed.
        return tensor.detach()

    def __enter__(self) -> Meter:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)


def forgetting() -> AbstractContextManager[None]:
    """Inside, autograd builds its graph, which says what needs a gradient, and saves nothing.

    Unlike under ``no_grad`` every operation takes the path that it takes when it is recomputed.
    """
    return saved_tensors_hooks(_nothing, _gone)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _nothing(_: torch.Tensor) -> None:
    return None


def _gone(_: None) -> torch.Tensor:
    raise AssertionError("the graph of a forward whose activations were dropped has been used")
