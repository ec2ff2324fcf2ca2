"""Autograd inside one stage, for one micro-batch.

A micro-batch enters through ``Entry``, a node of the graph that stands for the earlier stages. The input
is therefore not a leaf, so a stage may begin with an in-place layer, as the unsplit model may; and its
gradient is stored in a list, ``box``, and not accumulated in ``.grad``.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from rpcpipe.errors import ModelError
from rpcpipe.model.memory import extent
from rpcpipe.model.microbatch import Nest, map_tensors, tensors

# One gradient per tensor; None for a tensor to which no gradient flows back.
Gradients = list[torch.Tensor | None]


class Entry(torch.autograd.Function):
    """Identity on the inputs whose backward stores their gradients in ``box`` and stops there.

    ``anchor`` is an empty leaf that requires a gradient, so that autograd records the node.
    """

    @staticmethod
    def forward(ctx: Any, box: list[Any], anchor: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.box = box
        ctx.set_materialize_grads(False)
        return tuple(tensor.detach() for tensor in inputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[None, ...]:
        ctx.box[:] = grads
        return (None,) * (2 + len(grads))


@dataclass
class StageInput:
    """A nest that a stage receives, with one flag per tensor: whether to send a gradient back.

    ``aliased``: the numbers of tensors that lie over others where they come from; here they may not.
    """

    nest: Nest
    wants_grad: list[bool]
    aliased: Collection[int] = ()

    @classmethod
    def constant(cls, nest: Nest) -> StageInput:
        """Return ``nest`` as an input to which no gradient flows back, such as the driver's."""
        return cls(nest, [False] * len(tensors(nest)))


@dataclass
class GraphEntry:
    """The point where a micro-batch enters the graph: ``edges`` to the Entry node, ``box`` for gradients.

    If no input needs a gradient (on the first stage), ``inner`` holds the edges to the first layer's
    outputs. A split backward stops there, so that its halves cost the same as on other stages. ``hooks`` are those of
    the tensors at the edges, of aliased inputs and of the first layer's output, also those registered later.
    """

    edges: list[GradientEdge] = field(default_factory=list)
    box: Gradients = field(default_factory=list)
    inner: list[GradientEdge] = field(default_factory=list)
    hooks: list[Mapping[int, Any]] = field(default_factory=list)


@dataclass
class Saved:
    """The ends of one micro-batch's graph, kept from the forward to the backward.

    Of the outputs that need a gradient only the edges are kept: their values are needed by the next stage alone.
    """

    outputs: list[GradientEdge]
    entered: GraphEntry

    @classmethod
    def of(cls, outputs: Nest, entered: GraphEntry) -> Saved:
        """Return the ends of the graph that has computed ``outputs``."""
        return cls([get_gradient_edge(leaf) for leaf in differentiable(outputs)], entered)


def copied(received: StageInput) -> StageInput:
    """Return a copy of ``received`` that shares no memory with it."""
    return replace(received, nest=map_tensors(lambda leaf: leaf.detach().clone(), received.nest))


def enter(received: StageInput) -> tuple[Nest, GraphEntry]:
    """Return the nest with its gradients directed to a box, and the GraphEntry that holds the box."""
    leaves = tensors(received.nest)
    wanted = [leaf for leaf, wants in zip(leaves, received.wants_grad, strict=True) if wants]
    box: Gradients = [None] * len(wanted)
    if not wanted or not torch.is_grad_enabled():
        return received.nest, GraphEntry(box=box)
    anchor = torch.empty(0, requires_grad=True)
    entered = Entry.apply(box, anchor, *wanted)  # type: ignore[no-untyped-call]
    edges = [get_gradient_edge(tensor) for tensor in entered]
    replaced, flags = iter(entered), iter(received.wants_grad)
    nest = map_tensors(lambda leaf: next(replaced) if next(flags) else leaf, received.nest)
    leaves = tensors(nest) if received.aliased else []
    hooks = [hooks_of(leaves[number]) for number in received.aliased if received.wants_grad[number]]
    return nest, GraphEntry(edges, box, hooks=hooks)


def leave(outputs: Nest) -> StageInput:
    """Return ``outputs`` detached from this stage's graph, as the input of the next stage."""
    leaves = tensors(outputs)
    flags = [leaf.requires_grad for leaf in leaves]
    return StageInput(
        map_tensors(lambda leaf: leaf.detach(), outputs), flags, _overlapping(leaves) if len(leaves) > 1 else ()
    )


def _overlapping(leaves: Sequence[torch.Tensor]) -> Collection[int]:
    """Return the numbers of those of ``leaves`` that reach over memory of others."""
    found: set[int] = set()
    by_storage: dict[int, list[int]] = {}
    for number, leaf in enumerate(leaves):
        if leaf.layout is torch.strided and leaf.numel() and leaf.device.type != "meta":
            by_storage.setdefault(leaf.untyped_storage().data_ptr(), []).append(number)
    for numbers in by_storage.values():
        for one, other in itertools.combinations(numbers, 2):
            (start, end), (first, last) = extent(leaves[one]), extent(leaves[other])
            if start < last and first < end:
                found |= {one, other}
    return sorted(found)


def hooks_of(tensor: torch.Tensor) -> Mapping[int, Any]:
    """Return the dict of the tensor's hooks, which those registered later go into as well."""
    tensor.register_hook(_no_hook).remove()  # type: ignore[no-untyped-call]  # torch makes the dict with the first hook
    hooks: Mapping[int, Any] = tensor._backward_hooks  # type: ignore[assignment]
    return hooks


def _no_hook(_: torch.Tensor) -> None:
    pass


@contextmanager
def aliases_kept(received: StageInput) -> Iterator[None]:
    """Raise ModelError if the block changes an aliased input in place: the change would not reach all of them."""
    leaves = tensors(received.nest) if received.aliased else []
    before = [leaves[number]._version for number in received.aliased]
    yield
    if before != [leaves[number]._version for number in received.aliased]:
        raise ModelError(
            "a layer changes its input in place, which the layers before gave twice, or a part of it beside it: here"
            f" these are tensors of their own, and the others would not change; {_APART}"
        )


_APART = "change or hook a copy, give each value as a .clone(), or keep giver and taker in one stage, not recomputed"


def check_hooks(received: StageInput, entered: GraphEntry) -> None:
    """Raise ModelError if a layer hooked one of several inputs that are one tensor: it sees a part's gradient."""
    if received.aliased and not entered.inner and any(entered.hooks):
        raise ModelError(
            "a layer hooks its input, which the layers before gave twice, or a part of it beside it: the hook would"
            f" run on a part of the gradient that it gets in one process; {_APART}"
        )


def differentiable(outputs: Nest) -> list[torch.Tensor]:
    """Return the output tensors that need a gradient, in the order in which their gradients come back."""
    return [leaf for leaf in tensors(outputs) if leaf.requires_grad]


def backward(saved: Saved, grads: Gradients) -> Gradients:
    """Accumulate into the parameters' ``.grad``; return the inputs' gradients.

    An output that no later layer used has gradient None and is left out.
    """
    pairs = [(edge, grad) for edge, grad in zip(saved.outputs, grads, strict=True) if grad is not None]
    if pairs:
        torch.autograd.backward(*map(list, zip(*pairs, strict=True)))  # type: ignore[arg-type]
    return saved.entered.box
