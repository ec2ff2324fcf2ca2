"""Batches as nests of tensors: split into micro-batches, and merged again.

A nest is a tensor, a plain value, or a container of nests: a tuple, list, dict, dataclass, namespace or any other that
torch's pytree or ``nest_types`` knows. Dimension 0 of every tensor that has a dimension is the batch dimension, unless
``Replicated``, ``Batched`` or ``MicroBatches`` say otherwise.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from rpcpipe._arguments import require_iterable, require_numbers
from rpcpipe.errors import ArgumentError, require, require_whole
from rpcpipe.model import nest_types
from rpcpipe.model.nest_types import NestOfTensors, StandIn
from rpcpipe.transport import user_pickling

# A nest whose structure the model knows alone; what users give is a ``NestOfTensors``.
Nest = Any


def flatten(nest: Nest) -> tuple[list[Any], pytree.TreeSpec]:
    """Return the leaves of ``nest`` in a fixed order, and its structure."""
    leaves, spec = pytree.tree_flatten(nest)
    return flatten(nest) if _has_new_containers(leaves) else (leaves, spec)


def _has_new_containers(leaves: list[Any]) -> bool:
    """Register the containers among ``leaves`` with pytree; return whether there were any, which are no leaves then."""
    for leaf in leaves:
        if type(leaf) not in nest_types.leaf_types:
            return nest_types.register({type(leaf) for leaf in leaves} - nest_types.leaf_types)
    return False


unflatten = pytree.tree_unflatten


def tensors(nest: Nest) -> list[torch.Tensor]:
    """Return the tensors in ``nest``, in a fixed order."""
    found: list[torch.Tensor] = []
    if nest_types.collect_builtin(nest, found):
        return found
    leaves = pytree.tree_leaves(nest)
    return tensors(nest) if _has_new_containers(leaves) else [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def map_tensors(function: Any, nest: Nest) -> Nest:
    """Return ``nest`` with every tensor replaced by ``function(tensor)``."""
    if nest_types.collect_builtin(nest, []):
        return nest_types.map_builtin(function, nest)
    leaves, spec = flatten(nest)
    return unflatten([function(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec)


# A nest in a message: its tensors, which the transport sends beside the bytes, and everything else pickled.
Packed = tuple[list[torch.Tensor], bytes]


def pack(nest: Nest) -> Packed:
    """Return ``nest`` packed for a message, with its structure pickled by ``user_pickling``.

    That also handles classes defined in a script or a REPL. Errors of pickling are raised here
    and not on a thread of the transport.
    """
    leaves: list[torch.Tensor] = []

    def put_aside(tensor: torch.Tensor) -> _Place:
        leaves.append(tensor)
        return _Place(len(leaves) - 1)

    return leaves, user_pickling.dumps(map_tensors(put_aside, nest))


def unpack(packed: Packed) -> Nest:
    """Return the nest that ``pack`` has packed."""
    found, data = packed
    leaves, spec = flatten(user_pickling.loads(data))
    return unflatten([found[leaf.index] if isinstance(leaf, _Place) else leaf for leaf in leaves], spec)


class _Place:
    """Stands in the pickled nest for tensor ``index``."""

    def __init__(self, index: int) -> None:
        self.index = index


class Replicated(StandIn):
    """A value in inputs or targets that every micro-batch gets whole: ``rp.Replicated(mask)``."""

    def __init__(self, value: NestOfTensors) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"Replicated({self.value!r})"


class Batched(StandIn):
    """A value in inputs or targets with the batch in dimension ``dim`` of its tensors: ``rp.Batched(x, dim=1)``."""

    def __init__(self, value: NestOfTensors, dim: int) -> None:
        self.value, self.dim = value, require_whole("dim", dim, least=-math.inf)
        for tensor in tensors(value):
            require(
                -tensor.dim() <= dim < tensor.dim(),
                f"rp.Batched(…, dim={dim}) has a tensor of shape {tuple(tensor.shape)}, which has no such dimension",
            )

    def __repr__(self) -> str:
        return f"Batched({self.value!r}, dim={self.dim})"


class MicroBatches(StandIn):
    """A value in inputs or targets that the caller has cut into micro-batches, of any shapes.

    Their number takes the place of ``chunks``, and may be smaller. A micro-batch's loss has the weight of its samples,
    the size of dimension 0 where all tensors of its inputs, but for Replicated ones, agree on one, and else all have
    the same weight. ``weights`` says otherwise.
    """

    def __init__(self, parts: Sequence[NestOfTensors], weights: Sequence[float] | None = None) -> None:
        require_iterable("parts", parts, "micro-batches")
        self.parts = list(parts)
        self.weights = None if weights is None else require_numbers("weights", weights)
        require(bool(self.parts), "rp.MicroBatches needs at least one micro-batch")
        require(
            self.weights is None
            or (len(self.weights) == len(self.parts) and min(self.weights) >= 0 < sum(self.weights) < math.inf),
            f"rp.MicroBatches has {len(self.parts)} micro-batches and weights {self.weights}; pass one for each, none"
            " negative, not all 0, all finite",
        )

    def __repr__(self) -> str:
        return f"MicroBatches({self.parts!r})"


def map_batch(function: Any, nest: Nest) -> Nest:
    """Return inputs or targets with every tensor replaced by ``function(tensor)``, also inside of what says its cut."""
    leaves, spec = flatten(nest)
    return unflatten([_map_leaf(function, leaf) for leaf in leaves], spec)


def _map_leaf(function: Any, leaf: Any) -> Any:
    match leaf:
        case torch.Tensor():
            return function(leaf)
        case Replicated():
            return Replicated(map_tensors(function, leaf.value))
        case Batched():
            return Batched(map_tensors(function, leaf.value), leaf.dim)
        case MicroBatches():
            return MicroBatches([map_tensors(function, part) for part in leaf.parts], leaf.weights)
    return leaf


def copied(nest: Nest, *, with_gradients: bool = False) -> Nest:
    """Return a copy of inputs or targets, detached; the caller may fill the originals anew while it is under way.

    ``with_gradients``: what requires a gradient does so in the copy.
    """
    return map_batch(lambda tensor: _clone(tensor).requires_grad_(with_gradients and tensor.requires_grad), nest)


def _clone(tensor: torch.Tensor) -> torch.Tensor:
    """Return a detached copy, made by this thread alone: torch wakes one for every core, and workers need those."""
    source = tensor.detach()
    if source.layout is not torch.strided or source.device.type != "cpu" or not source.is_contiguous():
        return source.clone()
    if source.is_conj() or source.is_neg() or type(source) is not torch.Tensor or source.is_quantized:
        return source.clone()
    copy = torch.empty_like(source)
    ctypes.memmove(copy.data_ptr(), source.data_ptr(), source.nbytes)
    return copy


def batch_size(nest: Nest) -> int:
    """Return the length of the batch dimension, equal for all tensors of ``nest`` that have one.

    Raises ArgumentError if no tensor has a dimension, if the length is 0, or if two tensors disagree.
    """
    sizes = _batch_sizes(nest)
    if len(sizes) != 1 or 0 in sizes:
        raise ArgumentError(
            "a batch needs tensors that agree on a dimension 0 of at least 1;"
            f" their sizes are {sorted(sizes) or 'none'}."
            " Say rp.Replicated(value) of what all micro-batches share, rp.Batched(value, dim=…) where the batch is in"
            " another dimension, or rp.MicroBatches([…]) of what you have cut yourself"
        )
    return sizes.pop()


def _batch_sizes(nest: Nest) -> set[int]:
    sizes = set()
    for leaf in flatten(nest)[0]:
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            sizes.add(int(leaf.shape[0]))
        elif isinstance(leaf, Batched):
            sizes |= {int(tensor.shape[leaf.dim]) for tensor in tensors(leaf.value)}
    return sizes


class Cut(NamedTuple):
    """Micro-batches by replica, and of all in order the samples, which weigh their losses.

    ``by_caller``: they are those of a MicroBatches.
    """

    shares: list[list[Nest]]
    samples: list[float]
    by_caller: bool


def cut(nest: Nest, replicas: int, chunks: int) -> Cut:
    """Cut a batch into each replica's share, as ``tensor.chunk(replicas)``, and that into ``chunks`` micro-batches.

    A small batch makes fewer, for the last replicas none. Raises ArgumentError for what cannot be cut.
    """
    leaves, _ = flatten(nest)
    _check_arrays(leaves)
    made = [leaf for leaf in leaves if isinstance(leaf, MicroBatches)]
    if made:
        return _cut_by_caller(nest, made, replicas, chunks)
    shares = [_split(share, chunks) for share in _split(nest, replicas)]
    samples = [float(batch_size(part)) for share in shares for part in share]
    return Cut(_padded([[_unwrapped(part) for part in share] for share in shares], replicas), samples, by_caller=False)


def _check_arrays(leaves: Sequence[Any]) -> None:
    for leaf in leaves:
        require(
            not (type(leaf).__module__ == "numpy" and getattr(leaf, "ndim", None)),
            f"a batch is made of tensors and has a numpy {type(leaf).__name__}, which would not be cut into"
            " micro-batches; pass torch.as_tensor(array), or rp.Replicated(array) of what all share",
        )


def _padded(shares: list[list[Nest]], replicas: int) -> list[list[Nest]]:
    return [*shares, *([] for _ in range(replicas - len(shares)))]


def _cut_by_caller(nest: Nest, made: Sequence[MicroBatches], replicas: int, chunks: int) -> Cut:
    counts = sorted({len(leaf.parts) for leaf in made})
    require(len(counts) == 1, f"the rp.MicroBatches of a batch have {counts} micro-batches; cut all into as many")
    require(
        not _batch_sizes(nest),
        "beside rp.MicroBatches a batch has tensors that are not cut; cut them too, as another rp.MicroBatches, or say"
        " rp.Replicated(value) of what all micro-batches share",
    )
    leaves, spec = flatten(nest)
    parts = [
        unflatten([leaf.parts[i] if isinstance(leaf, MicroBatches) else leaf for leaf in leaves], spec)
        for i in range(counts[0])
    ]
    groups = [indices.tolist() for indices in torch.arange(counts[0]).chunk(replicas)]
    require(
        max(map(len, groups)) <= chunks,
        f"rp.MicroBatches has {counts[0]} micro-batches{f' for {replicas} replicas' if replicas > 1 else ''}, and the"
        f" pipeline runs at most {chunks * replicas}; make fewer, or a pipeline with more chunks",
    )
    shares = _padded([[_unwrapped(parts[i]) for i in group] for group in groups], replicas)
    return Cut(shares, _given_weights(made) or _samples(parts), by_caller=True)


def _given_weights(made: Sequence[MicroBatches]) -> list[float] | None:
    """Return the weights that the caller has given to one of ``made``; ArgumentError for two that differ."""
    given = [leaf.weights for leaf in made if leaf.weights is not None]
    require(
        all(weights == given[0] for weights in given),
        f"the rp.MicroBatches of a batch have different weights, {given}; give them to one alone, that of the inputs",
    )
    return given[0] if given else None


def _samples(parts: Sequence[Nest]) -> list[float]:
    sizes = [_batch_sizes(part) for part in parts]
    if any(len(size) != 1 or 0 in size for size in sizes):
        return [1.0] * len(parts)
    return [float(size.pop()) for size in sizes]


def _unwrapped(part: Nest) -> Nest:
    """Return ``part`` with the values in place of what says how to cut them."""
    leaves, spec = flatten(part)
    if not any(isinstance(leaf, (Replicated, Batched)) for leaf in leaves):
        return part
    return unflatten([leaf.value if isinstance(leaf, (Replicated, Batched)) else leaf for leaf in leaves], spec)


def split(nest: Nest, chunks: int) -> list[Nest]:
    """Return the micro-batches that ``tensor.chunk(chunks)`` makes: possibly fewer, the last one smaller.

    Values without a batch dimension go into every micro-batch.
    """
    return [_unwrapped(part) for part in _split(nest, chunks)]


def _split(nest: Nest, chunks: int) -> list[Nest]:
    """Return the parts of ``split``, in which Replicated and Batched are left."""
    leaves, spec = flatten(nest)
    count = len(torch.empty(batch_size(nest), device="meta").chunk(chunks))
    columns = [_split_leaf(leaf, chunks, count) for leaf in leaves]
    return [unflatten(list(row), spec) for row in zip(*columns, strict=True)]


def _split_leaf(leaf: Any, chunks: int, count: int) -> Sequence[Any]:
    if isinstance(leaf, torch.Tensor) and leaf.dim():
        return leaf.chunk(chunks)
    if isinstance(leaf, Batched):
        inner, spec = flatten(leaf.value)
        columns = [t.chunk(chunks, leaf.dim) if isinstance(t, torch.Tensor) else [t] * count for t in inner]
        return [Batched(unflatten(list(row), spec), leaf.dim) for row in zip(*columns, strict=True)]
    return [leaf] * count


def merge(nests: Sequence[Nest]) -> Nest:
    """Return one nest of the micro-batches' outputs, with tensors concatenated along dimension 0.

    Scalars, plain values, and tensors that differ in their other dimensions cannot be concatenated; they are returned
    as a list with one entry per micro-batch.
    """
    flat = [flatten(nest) for nest in nests]
    spec = flat[0][1]
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    return unflatten([_merge_leaves(column) for column in columns], spec)


def _merge_leaves(column: Sequence[Any]) -> Any:
    batched = all(isinstance(leaf, torch.Tensor) and leaf.dim() for leaf in column)
    if batched and len({leaf.shape[1:] for leaf in column}) == 1:
        return torch.cat(list(column))
    return column[0] if len(column) == 1 else list(column)


# A tensor of a micro-batch and its gradient.
Pair = tuple[torch.Tensor, torch.Tensor | None]


def merge_gradients(nest: Nest, parts: Sequence[Sequence[Pair]]) -> Nest:
    """Return the gradient of every tensor of a batch, in a nest like it, with None where there is none.

    ``parts`` holds each micro-batch's tensors, in their order, with their gradients. What was cut is concatenated, what
    all micro-batches share is summed. In place of Replicated and Batched is the nest of their gradients, in place of
    MicroBatches a list of nests.
    """
    columns = [iter(part) for part in parts]
    leaves, spec = flatten(nest)
    return unflatten([_merge_gradient(leaf, columns) for leaf in leaves], spec)


def _merge_gradient(leaf: Any, columns: Sequence[Iterator[Pair]]) -> Nest:
    match leaf:
        case torch.Tensor():
            return _whole([next(column) for column in columns], 0 if leaf.dim() else None)
        case Replicated() | Batched():
            dim = leaf.dim if isinstance(leaf, Batched) else None
            return _each(leaf.value, lambda: _whole([next(column) for column in columns], dim))
        case MicroBatches():
            pairs = zip(leaf.parts, columns, strict=True)
            return [_each(part, functools.partial(_second, column)) for part, column in pairs]
    return None


def _second(column: Iterator[Pair]) -> torch.Tensor | None:
    return next(column)[1]


def _each(nest: Nest, make: Callable[[], Any]) -> Nest:
    """Return ``nest`` with ``make()`` in place of every tensor, None in place of all else."""
    leaves, spec = flatten(nest)
    return unflatten([make() if isinstance(leaf, torch.Tensor) else None for leaf in leaves], spec)


def _whole(pairs: Sequence[Pair], dim: int | None) -> torch.Tensor | None:
    found = [gradient for _, gradient in pairs if gradient is not None]
    if not found:
        return None
    if dim is None:
        return functools.reduce(torch.add, found)
    return torch.cat([torch.zeros_like(part) if grad is None else grad for part, grad in pairs], dim)
