"""The backward in two halves: the input's gradient now, the weights' gradients later.

Zero-bubble schedules send the input's gradient on first (``I``) and do the weights' share of the
work (``W``) when nothing else is due (Qi et al., "Zero Bubble Pipeline Parallelism", section 2).

The trunk is the part of the graph that leads back to the stage's input. Where an edge leaves the
trunk towards parameters, the trunk's node computes both kinds of gradient, and autograd computes
only what is asked for: ``I`` asks for the input's gradients and for what arrives at each such node;
``W`` runs those nodes again for the other edges alone. No product is computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from rpcpipe.stage.autograd import Saved


@dataclass
class Branch:
    """A node of the trunk with ``edges`` towards parameters, and the gradients that reached it."""

    node: Node
    edges: list[GradientEdge]
    arrived: list[tuple[GradientEdge, torch.Tensor]] = field(default_factory=list)


@dataclass
class WeightBackward:
    """What ``W`` has still to do for one micro-batch."""

    branches: list[Branch] = field(default_factory=list)
    # Where the whole backward from here on is weight gradient: outputs that do not depend on the
    # stage's input, and the first layer of the first stage.
    roots: list[tuple[GradientEdge, torch.Tensor]] = field(default_factory=list)
    # Parameters used at several places: autograd has summed their gradient in ``I``.
    shared: list[tuple[GradientEdge, torch.Tensor]] = field(default_factory=list)


def backward_input(saved: Saved, grads: list[torch.Tensor | None]) -> tuple[list[torch.Tensor | None], WeightBackward]:
    """(the inputs' gradients, what is left for the weights)."""
    pairs = [(out, grad) for out, grad in zip(saved.outputs, grads, strict=True) if grad is not None]
    entries = saved.entered.edges or saved.entered.inner
    trunk = _Trunk([out.grad_fn for out, _ in pairs if out.grad_fn is not None], entries)
    # An output may be an input passed through: its gradient is the input's. The first layer's own
    # output, where the trunk ends inside the stage, is left to W with all below it.
    leading = trunk.nodes if saved.entered.edges else trunk.inside
    roots = [(get_gradient_edge(out), grad) for out, grad in pairs if out.grad_fn not in leading]
    deferred = WeightBackward(roots=roots)
    through = [pair for pair in pairs if pair[0].grad_fn in leading]
    if not through:
        return [None] * len(saved.entered.edges), deferred
    branches, shared = trunk.branches()
    arrivals = [GradientEdge(b.node, i) for b in branches for i in range(len(b.node._input_metadata))]
    found = torch.autograd.grad(
        [out for out, _ in through],
        [*entries, *arrivals, *shared],
        [grad for _, grad in through],
        retain_graph=True,
        allow_unused=True,
    )
    inputs: list[torch.Tensor | None] = list(found[: len(entries)])
    rest = found[len(entries) :]
    by_node = {id(branch.node): branch for branch in branches}
    for edge, grad in zip(arrivals, rest, strict=False):
        if grad is not None:
            by_node[id(edge.node)].arrived.append((edge, grad))
    deferred.branches = branches
    deferred.shared = [(e, g) for e, g in zip(shared, rest[len(arrivals) :], strict=True) if g is not None]
    trunk.release({id(branch.node) for branch in branches})
    if saved.entered.inner:
        deferred.roots += [(edge, grad) for edge, grad in zip(entries, inputs, strict=True) if grad is not None]
        inputs = []
    return inputs, deferred


def backward_weight(deferred: WeightBackward) -> None:
    """Accumulate the weights' gradients; autograd's order and bits are those of a whole backward."""
    ends: list[tuple[GradientEdge, torch.Tensor]] = []
    for edge, grad in deferred.shared:
        # By hand: autograd has run the parameter's hooks when it captured the sum.
        parameter = edge.node.variable  # type: ignore[attr-defined]
        parameter.grad = grad.clone() if parameter.grad is None else parameter.grad.add_(grad)
    for branch in deferred.branches:
        if branch.arrived:
            ends += _leave(branch)
    ends += deferred.roots
    if ends:
        torch.autograd.backward([edge for edge, _ in ends], [grad for _, grad in ends])


def _leave(branch: Branch) -> list[tuple[GradientEdge, torch.Tensor]]:
    """Run the branch's node for its edges: (edge, gradient) of those that lead to more than a parameter.

    Edges straight to a parameter end in it here; captured first, its hooks would run twice.
    """
    edges, grads = (list(column) for column in zip(*branch.arrived, strict=True))
    variables = [edge.node.variable for edge in branch.edges if hasattr(edge.node, "variable")]
    further = [edge for edge in branch.edges if not hasattr(edge.node, "variable")]
    if variables:
        torch.autograd.backward(edges, grads, inputs=variables, retain_graph=bool(further))
    if not further:
        return []
    found = torch.autograd.grad(edges, further, grads, allow_unused=True)
    return [(edge, grad) for edge, grad in zip(further, found, strict=True) if grad is not None]


class _Trunk:
    """The nodes from which the stage's input can be reached."""

    def __init__(self, roots: list[Node], entries: list[GradientEdge]) -> None:
        self._order = _children_first(roots)
        entry = {edge.node for edge in entries}
        self.nodes: set[Node] = set()
        for node in self._order:
            if node in entry or any(child in self.nodes for child, _ in node.next_functions):
                self.nodes.add(node)
        self.inside = self.nodes - entry

    def branches(self) -> tuple[list[Branch], list[GradientEdge]]:
        """(edges that leave the trunk, by node; accumulators reached by more than one of them)."""
        uses: dict[Node, int] = {}
        leaving = list(self._leaving())
        for _, edge in leaving:
            for accumulator in _accumulators(edge.node):
                uses[accumulator] = uses.get(accumulator, 0) + 1
        several = {accumulator for accumulator, count in uses.items() if count > 1}
        found: dict[Node, Branch] = {}
        for node, edge in leaving:
            if not several & _accumulators(edge.node):
                found.setdefault(node, Branch(node, [])).edges.append(edge)
        return list(found.values()), [GradientEdge(accumulator, 0) for accumulator in several]

    def _leaving(self) -> Iterator[tuple[Node, GradientEdge]]:
        for node in reversed(self._order):
            if node in self.inside:
                for child, index in node.next_functions:
                    if child is not None and child not in self.nodes and _accumulators(child):
                        yield node, GradientEdge(child, index)

    def release(self, kept: set[int]) -> None:
        """Free the tensors that only ``I`` needed: those of trunk nodes that ``W`` does not run."""
        for node in self.inside:
            if id(node) not in kept:
                for name in _saved_names(node):
                    _drop(getattr(node, name))


def _children_first(roots: list[Node]) -> list[Node]:
    """All nodes below ``roots``, every node after those it leads to (no recursion: graphs are deep)."""
    order: list[Node] = []
    state: dict[Node, bool] = {}
    stack = list(roots)
    while stack:
        node = stack[-1]
        if node not in state:
            state[node] = False
            stack += [child for child, _ in node.next_functions if child is not None and child not in state]
        else:
            stack.pop()
            if not state[node]:
                state[node] = True
                order.append(node)
    return order


def _accumulators(node: Node) -> set[Node]:
    """The parameters' accumulators below ``node``, itself included."""
    return {below for below in _children_first([node]) if hasattr(below, "variable")}


_names_by_type: dict[type, list[str]] = {}


def _saved_names(node: Node) -> list[str]:
    names = _names_by_type.get(type(node))
    if names is None:
        names = [name for name in dir(type(node)) if name.startswith("_raw_saved_")]
        _names_by_type[type(node)] = names
    return names


def _drop(saved: Any) -> None:
    """Make autograd forget a saved tensor by packing it into nothing."""
    for entry in saved if isinstance(saved, tuple) else (saved,):
        try:
            entry.register_hooks(lambda tensor: None, _gone)
        except RuntimeError:
            continue  # nothing is saved there, or the user's own hooks hold it


def _gone(_: None) -> torch.Tensor:
    raise AssertionError("a tensor that only the input's gradient needed was freed, and is needed again")
