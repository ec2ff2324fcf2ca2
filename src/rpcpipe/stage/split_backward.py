"""The backward in two halves: the gradient of the input first, the gradients of the weights later.

Zero-bubble schedules compute and send the input gradient first (``I``) and compute the weight gradients
(``W``) when no other action is due (Qi et al., "Zero Bubble Pipeline Parallelism", section 2).

The trunk is the part of the graph that leads back to the stage's input. A node of the trunk with an edge
towards parameters, a branch, can compute both kinds of gradient, and computes only those that the run of
autograd's engine around it wants: ``I`` wants the input gradients, and notes what arrives at the branches;
``W`` calls the branches again within a run that wants their edges towards parameters only. No product is
computed twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, Node, _engine_run_backward
from torch.utils.hooks import RemovableHandle

from rpcpipe.stage import autograd
from rpcpipe.stage.autograd import Saved
from rpcpipe.stage.gradients import has_hooks
from rpcpipe.stage.graph import Children, children_below, is_python, leaf_of, raw_saved

# torch.utils.checkpoint(use_reentrant=True) refuses inputs=…, a compiled graph retain_graph=True.
_WHOLE = {"CheckpointFunctionBackward", "CompiledFunctionBackward"}

# Nodes whose parameters' gradients cost less than to read what arrives, and the input, once more.
_TOGETHER = {
    "NativeLayerNormBackward0", "NativeGroupNormBackward0", "NativeBatchNormBackward0", "CudnnBatchNormBackward0",
    "MiopenBatchNormBackward0", "FusedRmsNormBackward0",
}  # fmt: skip

# Elements of a tensor that takes longer to free than it is worth.
_SMALL = 1024

# Edges, and the gradients that go in there.
Ends = list[tuple[GradientEdge, torch.Tensor]]


@dataclass
class Branch:
    """A node of the trunk with ``edges`` towards parameters, by number, and the gradients that ``arrived`` there."""

    node: Node
    edges: dict[int, GradientEdge]
    arrived: list[tuple[torch.Tensor | None, ...]] = field(default_factory=list)
    _handle: RemovableHandle | None = None

    def watch(self) -> bool:
        """Note what arrives when the node runs; return whether it has no other hooks."""
        note = self.arrived.append  # nothing that refers to the node, which refers to its hooks
        self._handle = self.node.register_hook(lambda _, arrived: note(arrived))
        hooks: Any = self._handle.hooks_dict_ref()
        return len(hooks) == 1

    def forget(self) -> None:
        """Do not note what arrives."""
        if self._handle is not None:
            self._handle.remove()


@dataclass
class WeightBackward:
    """The work left to ``W`` for one micro-batch.

    ``ends``: edges below which all is weight gradient: outputs that do not depend on the stage's input, the first
    layer of the first stage, and parameters whose gradient ``I`` has computed.
    """

    branches: list[Branch] = field(default_factory=list)
    ends: Ends = field(default_factory=list)


def backward_input(saved: Saved, grads: list[torch.Tensor | None]) -> tuple[list[torch.Tensor | None], WeightBackward]:
    """Run the first half of the backward; return the input gradients and the deferred weight gradients.

    ``grads`` are the gradients of ``saved.outputs``, None for an output that no later layer used. Accumulates
    nothing into ``.grad``, unless a parameter has hooks or gets a gradient in both halves: then the whole
    backward runs here, because autograd sums the parts of a gradient first.
    """
    pairs = [(edge, grad) for edge, grad in zip(saved.outputs, grads, strict=True) if grad is not None]
    entries = saved.entered.edges or saved.entered.inner
    trunk = _Trunk([edge.node for edge, _ in pairs], entries)
    # An output may be an input passed through; its gradient is the input's gradient. Where the trunk ends at
    # the first layer's output, inside the stage, that output and everything below it are left to W.
    leading = trunk.inside | trunk.entries if saved.entered.edges else trunk.inside
    ends = [(edge, grad) for edge, grad in pairs if edge.node not in leading]
    # A hook on the first layer's output would run where I ends and once more where W begins.
    if trunk.whole or any(saved.entered.hooks) or trunk.meets([edge.node for edge, _ in ends]):
        return autograd.backward(saved, grads), WeightBackward()
    through = [pair for pair in pairs if pair[0].node in leading]
    if not through:
        return [None] * len(saved.entered.edges), WeightBackward(ends=ends)
    branches, early = trunk.branches()
    captured = torch.autograd.grad(
        [edge for edge, _ in through],
        [*entries, *early],
        [grad for _, grad in through],
        retain_graph=bool(branches),
        allow_unused=True,
    )
    inputs: list[torch.Tensor | None] = list(captured[: len(entries)])
    if branches:
        trunk.release({branch.node for branch in branches})
    ends += _present(early, captured[len(entries) :])
    if saved.entered.inner:
        ends += _present(entries, inputs)
        inputs = []
    return inputs, WeightBackward([branch for branch in branches if branch.arrived], ends)


def backward_weight(deferred: WeightBackward) -> None:
    """Accumulate the weight gradients into ``.grad``, with the order and bits of a full backward."""
    ends = _leave(deferred.branches) + deferred.ends
    if ends:
        # Not torch.autograd.backward, which refuses a gradient that the engine has yet to sum to the edge's shape:
        # that of a parameter which was broadcast.
        edges, grads = zip(*ends, strict=True)
        _engine_run_backward(edges, grads, False, False, (), allow_unreachable=True, accumulate_grad=True)


def _leave(branches: list[Branch]) -> Ends:
    """Call the branches, and forget them; return the gradients that leave them towards parameters.

    A node computes gradients for those of its edges that the engine's current run wants, and outside of a run for
    all. So a hook calls them in the run of a leaf of its own that wants their edges too. A run for each branch would
    cost more, as it goes over the whole graph below; one run from all branches would pass through the trunk.
    """
    if not branches:
        return []
    ends: Ends = []

    def call(_: torch.Tensor) -> None:
        while branches:  # outputs first, so that each is freed, as only the nodes above hold it
            branch = branches.pop()
            grads = branch.node(*branch.arrived.pop())  # type: ignore[operator]
            ends.extend((edge, grads[number]) for number, edge in branch.edges.items() if grads[number] is not None)

    leaf = torch.empty(0, device="cpu", requires_grad=True)
    leaf.register_hook(call)  # type: ignore[no-untyped-call]
    wanted = (leaf, *(edge for branch in branches for edge in branch.edges.values()))
    _engine_run_backward((leaf,), (leaf.detach(),), False, False, wanted, allow_unreachable=True, accumulate_grad=False)
    return ends


def _present(edges: Sequence[GradientEdge], grads: Sequence[torch.Tensor | None]) -> Ends:
    return [(edge, grad) for edge, grad in zip(edges, grads, strict=True) if grad is not None]


class _Trunk:
    """The nodes from which the stage's input can be reached at ``entries``: these, and those ``inside`` the stage.

    ``whole``: a node refuses to run for some of its inputs alone, or twice, or a parameter below has hooks.
    """

    def __init__(self, roots: list[Node], entries: list[GradientEdge]) -> None:
        self.entries = {edge.node for edge in entries}
        self.inside: set[Node] = set()
        self._leaving: list[Branch] = []
        # By node that is not inside, the accumulators below it, itself included.
        self._below: dict[Node, frozenset[Node]] = {}
        self._hooked = False
        self._sort(children_below(roots))
        self.whole = self._hooked or not _WHOLE.isdisjoint({type(node).__name__ for node in self.inside})

    def _sort(self, graph: dict[Node, Children]) -> None:
        """Divide the nodes by whether they are inside; note the edges that leave there towards parameters.

        This runs for every micro-batch while others wait for its gradient.
        """
        entries, inside, below = self.entries, self.inside, self._below
        for node, children in graph.items():
            if node in entries or not any([child in inside or child in entries for child, _ in children]):  # noqa: C419
                below[node] = self._accumulators(node, children)
                continue
            inside.add(node)
            if len(children) > 1:
                edges = {
                    number: GradientEdge(child, index)
                    for number, (child, index) in enumerate(children)
                    if child is not None and below.get(child) and child not in entries
                }
                if edges:
                    self._leaving.append(Branch(node, edges))

    def _accumulators(self, node: Node, children: Children) -> frozenset[Node]:
        if children:
            found = {self._below[child] for child, _ in children if child is not None}
            return found.pop() if len(found) == 1 else frozenset().union(*found)
        leaf = leaf_of(node)
        self._hooked = self._hooked or (leaf is not None and has_hooks(leaf))
        return frozenset() if leaf is None else frozenset((node,))

    def meets(self, roots: Iterable[Node]) -> bool:
        """Return whether an accumulator below a branch is also below an entry or one of ``roots``."""
        under: frozenset[Node] = frozenset().union(*(self._below.get(node, ()) for node in (*self.entries, *roots)))
        return any(
            not under.isdisjoint(self._below[edge.node]) for branch in self._leaving for edge in branch.edges.values()
        )

    def branches(self) -> tuple[list[Branch], list[GradientEdge]]:
        """Return the branches that ``W`` calls, inputs first, and the accumulators whose gradients ``I`` computes.

        These are the accumulators that several edges reach, because autograd sums their gradients, and those below a
        node that runs once: a norm, a node with hooks, or a custom Function, whose backward may have side effects.
        """
        early: set[Node] = set()
        seen: set[Node] = set()
        for branch in self._leaving:
            node = branch.node
            once = is_python(node) or type(node).__name__ in _TOGETHER or not branch.watch()
            for edge in branch.edges.values():
                below = self._below[edge.node]
                early |= below if once else below & seen
                seen |= below
        if early:
            early = self._take(early)
        return [branch for branch in self._leaving if branch.edges], [GradientEdge(node, 0) for node in early]

    def _take(self, early: set[Node]) -> set[Node]:
        """Take from the branches the edges that reach ``early``; return all accumulators that these edges reach."""
        reached: set[Node] = set()
        while reached != early:
            reached = early
            early = early.union(*(below for branch in self._leaving for below in self._of(branch) if below & early))
        for branch in self._leaving:
            branch.edges = {number: edge for number, edge in branch.edges.items() if not self._below[edge.node] & early}
            if not branch.edges:
                branch.forget()
        return early

    def _of(self, branch: Branch) -> Iterator[frozenset[Node]]:
        return (self._below[edge.node] for edge in branch.edges.values())

    def release(self, kept: set[Node]) -> None:
        """Free the saved tensors of nodes inside that ``W`` does not call; ``kept`` holds those that it calls."""
        for node in self.inside - kept:
            for saved in raw_saved(node):
                _drop(saved)


def _drop(saved: Any) -> None:
    """Free a saved tensor, unless it is small or a hook of the user's holds it, by hooks that pack it into None."""
    with contextlib.suppress(RuntimeError):  # it is freed already
        if saved.unpack_hook is None and (tensor := saved.data) is not None and tensor.numel() >= _SMALL:
            saved.register_hooks(_nothing, _gone)


def _nothing(_: torch.Tensor) -> None:
    return None


def _gone(_: None) -> torch.Tensor:
    raise AssertionError("a tensor that only the input's gradient needed was freed, and is needed again")
