"""The backward in two halves: the gradient of the input first, the gradients of the weights later.

Zero-bubble schedules compute and send the input gradient first (``I``) and compute the weight gradients
(``W``) when no other action is due (Qi et al., "Zero Bubble Pipeline Parallelism", section 2).

The trunk is the part of the graph that leads back to the stage's input. A node of the trunk with an edge
towards parameters can compute both kinds of gradient, and autograd computes only those that are requested:
``I`` requests the input gradients and the gradients that arrive at each such node; ``W`` runs these nodes
again for the edges towards parameters only. No product is computed twice.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, Node

from rpcpipe.stage import autograd
from rpcpipe.stage.autograd import Saved
from rpcpipe.stage.gradients import has_hooks
from rpcpipe.stage.graph import accumulators_below, is_python, leaf_of, nodes_below, raw_saved

# torch.utils.checkpoint(use_reentrant=True) refuses inputs=…, a compiled graph retain_graph=True.
_WHOLE = ("CheckpointFunctionBackward", "CompiledFunctionBackward")


@dataclass
class Branch:
    """A node of the trunk with ``edges`` towards parameters, and the gradients that reached it."""

    node: Node
    edges: list[GradientEdge]
    arrived: list[tuple[GradientEdge, torch.Tensor]] = field(default_factory=list)


@dataclass
class WeightBackward:
    """The work left to ``W`` for one micro-batch."""

    branches: list[Branch] = field(default_factory=list)
    # Edges below which the whole backward is weight gradient: outputs that do not depend on the
    # stage's input, and the first layer of the first stage.
    roots: list[tuple[GradientEdge, torch.Tensor]] = field(default_factory=list)
    # Parameters that several branches use: autograd has summed their gradients in ``I``.
    shared: list[tuple[GradientEdge, torch.Tensor]] = field(default_factory=list)


def backward_input(saved: Saved, grads: list[torch.Tensor | None]) -> tuple[list[torch.Tensor | None], WeightBackward]:
    """Run the first half of the backward; return the input gradients and the deferred weight gradients.

    ``grads`` are the gradients of ``saved.outputs``, None for an output that no later layer used. Accumulates
    nothing into ``.grad``, unless a parameter has hooks: then the whole backward runs here, because the halves
    would run the hooks on parts of a gradient that autograd sums first.
    """
    pairs = [(edge, grad) for edge, grad in zip(saved.outputs, grads, strict=True) if grad is not None]
    entries = saved.entered.edges or saved.entered.inner
    trunk = _Trunk([edge.node for edge, _ in pairs], entries)
    # A hook on the first layer's output would run where I ends and once more where W begins.
    if trunk.whole or any(saved.entered.hooks):
        return autograd.backward(saved, grads), WeightBackward()
    # An output may be an input passed through; its gradient is the input's gradient. Where the trunk ends at
    # the first layer's output, inside the stage, that output and everything below it are left to W.
    leading = trunk.nodes if saved.entered.edges else trunk.inside
    roots = [(edge, grad) for edge, grad in pairs if edge.node not in leading]
    deferred = WeightBackward(roots=roots)
    through = [pair for pair in pairs if pair[0].node in leading]
    if not through:
        return [None] * len(saved.entered.edges), deferred
    branches, shared = trunk.branches()
    arrivals = [
        GradientEdge(branch.node, index) for branch in branches for index in range(len(branch.node._input_metadata))
    ]
    captured = torch.autograd.grad(
        [edge for edge, _ in through],
        [*entries, *arrivals, *shared],
        [grad for _, grad in through],
        retain_graph=True,
        allow_unused=True,
    )
    inputs: list[torch.Tensor | None] = list(captured[: len(entries)])
    rest = captured[len(entries) :]
    by_node = {id(branch.node): branch for branch in branches}
    for edge, grad in zip(arrivals, rest, strict=False):
        if grad is not None:
            by_node[id(edge.node)].arrived.append((edge, grad))
    deferred.branches = branches
    shared_grads = rest[len(arrivals) :]
    deferred.shared = [(edge, grad) for edge, grad in zip(shared, shared_grads, strict=True) if grad is not None]
    trunk.release({id(branch.node) for branch in branches})
    if saved.entered.inner:
        deferred.roots += [(edge, grad) for edge, grad in zip(entries, inputs, strict=True) if grad is not None]
        inputs = []
    return inputs, deferred


def backward_weight(deferred: WeightBackward) -> None:
    """Accumulate the weight gradients into ``.grad``, with the order and bits of a full backward."""
    ends: list[tuple[GradientEdge, torch.Tensor]] = []
    for edge, grad in deferred.shared:
        # Accumulated without autograd, which ran the parameter's hooks when it captured the sum.
        parameter = edge.node.variable  # type: ignore[attr-defined]
        parameter.grad = grad.clone() if parameter.grad is None else parameter.grad.add_(grad)
    for branch in deferred.branches:
        if branch.arrived:
            ends += _leave(branch)
    ends += deferred.roots
    if ends:
        torch.autograd.backward([edge for edge, _ in ends], [grad for _, grad in ends])


def _leave(branch: Branch) -> list[tuple[GradientEdge, torch.Tensor]]:
    """Run the branch's node; return (edge, gradient) for its edges that do not end at a parameter.

    For edges that end at a parameter the gradient is accumulated here: if it were captured first, the
    parameter's hooks would run twice.
    """
    edges, grads = (list(column) for column in zip(*branch.arrived, strict=True))
    variables = [leaf for edge in branch.edges if (leaf := leaf_of(edge.node)) is not None]
    further = [edge for edge in branch.edges if leaf_of(edge.node) is None]
    if variables:
        torch.autograd.backward(edges, grads, inputs=variables, retain_graph=bool(further))
    if not further:
        return []
    further_grads = torch.autograd.grad(edges, further, grads, allow_unused=True)
    return [(edge, grad) for edge, grad in zip(further, further_grads, strict=True) if grad is not None]


class _Trunk:
    """The nodes from which the stage's input can be reached."""

    def __init__(self, roots: list[Node], entries: list[GradientEdge]) -> None:
        self._order = nodes_below(roots)
        entry = {edge.node for edge in entries}
        self.nodes: set[Node] = set()
        for node in self._order:
            if node in entry or any(child in self.nodes for child, _ in node.next_functions):
                self.nodes.add(node)
        self.inside = self.nodes - entry

    @property
    def whole(self) -> bool:
        """Whether a node refuses to run for some of its inputs alone, or twice, or a parameter below has hooks."""
        hooked = (has_hooks(leaf) for leaf in map(leaf_of, self._order) if leaf is not None)
        return any(type(node).__name__ in _WHOLE for node in self.inside) or any(hooked)

    def branches(self) -> tuple[list[Branch], list[GradientEdge]]:
        """Return the edges that leave the trunk, by node, and the accumulators whose gradients ``I`` computes.

        These are the accumulators that several edges reach, because autograd sums their gradients, and those below a
        custom Function, whose backward may have side effects and so runs once.
        """
        leaving = list(self._leaving())
        uses = Counter(accumulator for _, _, below in leaving for accumulator in below)
        early = {accumulator for accumulator, count in uses.items() if count > 1}
        early |= {accumulator for node, _, below in leaving if is_python(node) for accumulator in below}
        reached: set[Node] = set()
        while reached != early:  # an edge is either run by W for all its accumulators, or for none
            reached = early
            early = reached.union(*(below for _, _, below in leaving if below & reached))
        branches: dict[Node, Branch] = {}
        for node, edge, below in leaving:
            if not below & early:
                branches.setdefault(node, Branch(node, [])).edges.append(edge)
        return list(branches.values()), [GradientEdge(accumulator, 0) for accumulator in early]

    def _leaving(self) -> Iterator[tuple[Node, GradientEdge, set[Node]]]:
        """Yield (trunk node, edge, accumulators below it) for every edge from the trunk towards parameters."""
        for node in reversed(self._order):
            if node in self.inside:
                for child, index in node.next_functions:
                    if child is not None and child not in self.nodes and (below := accumulators_below(child)):
                        yield node, GradientEdge(child, index), below

    def release(self, kept: set[int]) -> None:
        """Free the saved tensors of trunk nodes that ``W`` does not run; ``kept`` holds the ids of those it runs."""
        for node in self.inside:
            if id(node) not in kept:
                for saved in raw_saved(node):
                    _drop(saved)


def _drop(saved: Any) -> None:
    """Free a saved tensor by hooks that pack it into None."""
    with contextlib.suppress(RuntimeError):  # no tensor is saved, or the user's hooks hold it
        saved.register_hooks(lambda tensor: None, _gone)


def _gone(_: None) -> torch.Tensor:
    raise AssertionError("a tensor that only the input's gradient needed was freed, and is needed again")
