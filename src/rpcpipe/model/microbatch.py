"""Batches as nests of tensors: split into micro-batches, and merged again.

A nest is a tensor, a plain value, or a tuple, list or dict of nests (any container that torch's pytree
knows). Dimension 0 of every tensor that has a dimension is the batch dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from rpcpipe.errors import ArgumentError
from rpcpipe.transport import pickler

Nest = Any


def tensors(nest: Nest) -> list[torch.Tensor]:
    """Return the tensors in ``nest``, in a fixed order."""
    return [leaf for leaf in pytree.tree_leaves(nest) if isinstance(leaf, torch.Tensor)]


def map_tensors(function: Any, nest: Nest) -> Nest:
    """Return ``nest`` with every tensor replaced by ``function(tensor)``."""
    return pytree.tree_map_only(torch.Tensor, function, nest)


# A nest in a message: its tensors, which the transport sends beside the bytes, and everything else pickled.
Packed = tuple[list[torch.Tensor], bytes]


def pack(nest: Nest) -> Packed:
    """Return ``nest`` packed for a message, with its structure pickled by ``pickler``.

    That also handles classes defined in a script or a REPL. Errors of pickling are raised here
    and not on a thread of the transport.
    """
    leaves: list[torch.Tensor] = []

    def put_aside(tensor: torch.Tensor) -> _Place:
        leaves.append(tensor)
        return _Place(len(leaves) - 1)

    return leaves, pickler.dumps(map_tensors(put_aside, nest))


def unpack(packed: Packed) -> Nest:
    """Return the nest that ``pack`` has packed."""
    leaves, data = packed
    return pytree.tree_map_only(_Place, lambda place: leaves[place.index], pickler.loads(data))


@dataclass(frozen=True)
class _Place:
    """Stands in the pickled nest for tensor ``index``."""

    index: int


def batch_size(nest: Nest) -> int:
    """Return the length of dimension 0, equal for all tensors of ``nest`` that have a dimension.

    Raises ArgumentError if no tensor has a dimension, if the length is 0, or if two tensors disagree.
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
    """Return the micro-batches that ``tensor.chunk(chunks)`` makes: possibly fewer, the last one smaller.

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
    """Return one nest of the micro-batches' outputs, with tensors concatenated along dimension 0.

    Scalars and plain values cannot be concatenated; they are returned as a list with one entry per micro-batch.
    """
    flat = [pytree.tree_flatten(nest) for nest in nests]
    spec = flat[0][1]
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    return pytree.tree_unflatten([_merge_leaves(column) for column in columns], spec)


def _merge_leaves(column: Sequence[Any]) -> Any:
    if all(isinstance(leaf, torch.Tensor) and leaf.dim() for leaf in column):
        return torch.cat(list(column))
    return column[0] if len(column) == 1 else list(column)
