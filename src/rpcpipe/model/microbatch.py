"""Batches as nests of tensors: cut into micro-batches, put together again.

A nest is a tensor, a plain value, or tuples, lists and dicts of nests (anything torch's pytree
knows). The batch is dimension 0 of every tensor that has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cloudpickle
import torch
from torch.utils import _pytree as pytree

from rpcpipe.errors import ArgumentError

Nest = Any


def tensors(nest: Nest) -> list[torch.Tensor]:
    """The tensors in ``nest``, in a fixed order."""
    return [leaf for leaf in pytree.tree_leaves(nest) if isinstance(leaf, torch.Tensor)]


def map_tensors(function: Any, nest: Nest) -> Nest:
    """``nest`` with every tensor replaced by ``function(tensor)``."""
    return pytree.tree_map_only(torch.Tensor, function, nest)


# A nest as it travels: its tensors, which the transport carries beside the bytes, and all else pickled.
Packed = tuple[list[torch.Tensor], bytes]


def pack(nest: Nest) -> Packed:
    """``nest`` with its structure by cloudpickle, which knows the classes of a script or a REPL.

    Raises what pickling raises, here rather than on a thread of the transport.
    """
    found: list[torch.Tensor] = []

    def put_aside(tensor: torch.Tensor) -> _Place:
        found.append(tensor)
        return _Place(len(found) - 1)

    return found, cloudpickle.dumps(map_tensors(put_aside, nest))


def unpack(packed: Packed) -> Nest:
    """Inverse of ``pack``."""
    found, data = packed
    return pytree.tree_map_only(_Place, lambda place: found[place.index], cloudpickle.loads(data))


@dataclass(frozen=True)
class _Place:
    """Where a tensor was."""

    index: int


def batch_size(nest: Nest) -> int:
    """Length of dimension 0, the same for all tensors of ``nest`` that have a dimension.

    Raises ArgumentError if there is none, if it is 0, or if two disagree.
    """
    sizes = {leaf.shape[0] for leaf in tensors(nest) if leaf.dim()}
    if len(sizes) != 1 or 0 in sizes:
        raise ArgumentError(
            "a batch needs tensors that agree on a dimension 0 of at least 1;"
            f" their sizes are {sorted(sizes) or 'none'}."
            " Expand what all micro-batches share along dimension 0, or pass it to the layer's constructor"
        )
    return int(sizes.pop())


def split(nest: Nest, chunks: int) -> list[Nest]:
    """Micro-batches as ``tensor.chunk(chunks)`` makes them: possibly fewer, the last smaller.

    Values without a batch dimension go into every micro-batch.
    """
    leaves, spec = pytree.tree_flatten(nest)
    cut = [leaf.chunk(chunks) if isinstance(leaf, torch.Tensor) and leaf.dim() else leaf for leaf in leaves]
    count = len(torch.empty(batch_size(nest), device="meta").chunk(chunks))
    return [
        pytree.tree_unflatten([part[i] if isinstance(part, tuple) else part for part in cut], spec)
        for i in range(count)
    ]


def merge(nests: Sequence[Nest]) -> Nest:
    """One nest from micro-batches' outputs: tensors concatenated along dimension 0.

    Scalars and plain values cannot be concatenated and come as a list, one per micro-batch.
    """
    flat = [pytree.tree_flatten(nest) for nest in nests]
    spec = flat[0][1]
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    return pytree.tree_unflatten([_merge_leaves(column) for column in columns], spec)


def _merge_leaves(column: Sequence[Any]) -> Any:
    if all(isinstance(leaf, torch.Tensor) and leaf.dim() for leaf in column):
        return torch.cat(list(column))
    return column[0] if len(column) == 1 else list(column)
