"""Counts the memory that autograd keeps of a forward."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.autograd.graph import get_gradient_edge

from rpcpipe.stage.graph import nodes_below, saved_tensors


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


def saved_by_graph(outputs: Iterable[torch.Tensor]) -> Memory:
    """Return the memory that autograd keeps for the backward of ``outputs``."""
    roots = [get_gradient_edge(leaf).node for leaf in outputs if leaf.requires_grad]
    return Memory(tensor for node in nodes_below(roots) for tensor in saved_tensors(node))
