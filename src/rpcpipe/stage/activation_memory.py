"""The tensors that autograd saves during a forward: measure their memory, or save none."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks


class Memory:
    """Distinct memory of tensors. A storage shared by several views counts with the bytes that the views cover."""

    def __init__(self, tensors: Iterable[torch.Tensor] = ()) -> None:
        self._parts: dict[int, set[tuple[int, int]]] = {}
        self._sizes: dict[int, int] = {}
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: torch.Tensor) -> None:
        """Add the memory of ``tensor``; of a sparse one that of its indices and values."""
        if tensor.layout is not torch.strided:
            for part in _parts(tensor):
                self.add(part)
            return
        storage = tensor.untyped_storage()
        address = storage.data_ptr() or storage._cdata  # the meta device has no memory, so data_ptr is 0
        self._sizes[address] = storage.nbytes()
        self._parts.setdefault(address, set()).add((int(tensor.storage_offset()), tensor.nbytes))

    def without(self, *others: Memory) -> int:
        """Return the bytes, without the storages in ``others``."""
        return sum(
            min(self._sizes[address], sum(size for _, size in parts))
            for address, parts in self._parts.items()
            if not any(address in other._parts for other in others)
        )


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    tensor = tensor.detach()
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        return [tensor.indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []  # opaque, as mkldnn's


class Meter:
    """Measures the distinct memory that autograd saves inside the with-block, without the tensors in ``known``."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        self._known = Memory(known)
        self.saved = Memory()
        self._hooks: AbstractContextManager[None] = saved_tensors_hooks(self._pack, _same)

    @property
    def bytes(self) -> int:
        """Saved bytes."""
        return self.saved.without(self._known)

    def beside(self, other: Memory) -> int:
        """Return the saved bytes, also without the storages in ``other``."""
        return self.saved.without(self._known, other)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.saved.add(tensor)
        # Detached: the tensor may be an output of the node that saves it, which makes a cycle that is never freed.
        return tensor.detach()

    def __enter__(self) -> Meter:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)


def forgetting() -> AbstractContextManager[None]:
    """Return a context in which autograd builds its graph, which tells what needs a gradient, but saves no tensor.

    Unlike under ``no_grad``, every operation takes the same code path as in its recomputation.
    """
    return saved_tensors_hooks(_nothing, _gone)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _nothing(_: torch.Tensor) -> None:
    return None


def _gone(_: None) -> torch.Tensor:
    raise AssertionError("the graph of a forward whose activations were dropped has been used")
