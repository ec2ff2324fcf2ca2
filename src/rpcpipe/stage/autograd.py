"""Autograd inside one stage, for one micro-batch.

A micro-batch enters through ``Entry``, a node of the graph that stands for the stages before: the
input is no leaf (so a stage may begin with an in-place layer, as it may in the unsplit model) and
its gradient ends in a box instead of an accumulator.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from rpcpipe.model.microbatch import Nest, map_tensors, tensors

# By tensor, None where nothing flows back.
Gradients = list[torch.Tensor | None]


class Entry(torch.autograd.Function):
    """Identity on the inputs; its backward puts their gradients into ``box`` and ends there."""

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
    """A nest from the stage before, with one flag per tensor: does a gradient go back?"""

    nest: Nest
    wants_grad: list[bool]

    @classmethod
    def constant(cls, nest: Nest) -> StageInput:
        """The driver's input: no gradient goes back."""
        return cls(nest, [False] * len(tensors(nest)))


@dataclass
class GraphEntry:
    """Where a micro-batch entered the graph: ``edges`` to the Entry node, ``box`` for gradients.

    Where nothing entered that needs a gradient (the first stage), ``inner`` edges lead to the first
    layer's outputs: a split backward stops there, so that its halves cost what they cost elsewhere.
    """

    edges: list[GradientEdge] = field(default_factory=list)
    box: Gradients = field(default_factory=list)
    inner: list[GradientEdge] = field(default_factory=list)


@dataclass
class Saved:
    """What a stage keeps of one micro-batch between its forward and its backward."""

    outputs: list[torch.Tensor]
    entered: GraphEntry


def copied(received: StageInput) -> StageInput:
    """The same in memory of its own."""
    return StageInput(map_tensors(lambda leaf: leaf.detach().clone(), received.nest), received.wants_grad)


def enter(received: StageInput) -> tuple[Nest, GraphEntry]:
    """The nest with gradients flowing to a box, and where that is."""
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
    return nest, GraphEntry(edges, box)


def leave(outputs: Nest) -> StageInput:
    """What goes to the next stage: the outputs cut off from this stage's graph."""
    flags = [leaf.requires_grad for leaf in tensors(outputs)]
    return StageInput(map_tensors(lambda leaf: leaf.detach(), outputs), flags)


def differentiable(outputs: Nest) -> list[torch.Tensor]:
    """The output tensors that need a gradient, in the order in which their gradients come back."""
    return [leaf for leaf in tensors(outputs) if leaf.requires_grad]


def backward(saved: Saved, grads: Gradients) -> Gradients:
    """Accumulate into the parameters' ``.grad``; return the inputs' gradients.

    An output that nothing downstream used has gradient None and is left out.
    """
    pairs = [(out, grad) for out, grad in zip(saved.outputs, grads, strict=True) if grad is not None]
    if pairs:
        torch.autograd.backward(*map(list, zip(*pairs, strict=True)))  # type: ignore[arg-type]
    return saved.entered.box
