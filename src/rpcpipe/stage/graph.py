"""Reads the graph that autograd has recorded: its nodes, and the tensors that they save.

Nothing here installs hooks on saved tensors: torch.func refuses to run under them, and a tensor that a hook has packed
escapes autograd's check that it was not modified in place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

# What a node leads to: (node, number among its inputs), or (None, 0) where no gradient is needed.
Children = tuple[tuple[Node | None, int], ...]


def children_below(roots: Iterable[Node], stop: Collection[Node] = ()) -> dict[Node, Children]:
    """Return all nodes below ``roots`` with their children, each after these; those in ``stop`` are not entered.

    Without recursion, because graphs are deep.
    """
    ordered: dict[Node, Children] = {}
    entered: dict[Node, Children | None] = dict.fromkeys(stop)  # None once in ``ordered``
    stack = list(roots)
    while stack:
        node = stack[-1]
        if node not in entered:
            entered[node] = children = node.next_functions
            stack += [child for child, _ in children if child is not None and child not in entered]
        else:
            stack.pop()
            if (finished := entered[node]) is not None:
                ordered[node] = finished
                entered[node] = None
    return ordered


def nodes_below(roots: Iterable[Node], stop: Collection[Node] = ()) -> list[Node]:
    """Return all nodes below ``roots``, each after the nodes that it leads to; those in ``stop`` are not entered."""
    return list(children_below(roots, stop))


def leaf_of(node: Node) -> torch.Tensor | None:
    """Return the leaf into whose ``.grad`` ``node`` accumulates; None for every other kind of node."""
    return getattr(node, "variable", None)


def is_python(node: Node) -> bool:
    """Return whether the user's Python code runs in ``node``: a custom ``torch.autograd.Function``."""
    return isinstance(node, BackwardCFunction)


_names_by_type: dict[type, list[str]] = {}


def raw_saved(node: Node) -> Iterator[Any]:
    """Yield the ``SavedTensor`` objects of ``node``."""
    names = _names_by_type.get(type(node))
    if names is None:
        names = [name for name in dir(type(node)) if name.startswith("_raw_saved_")]
        _names_by_type[type(node)] = names
    for name in names:
        saved = getattr(node, name)
        yield from saved if isinstance(saved, tuple) else (saved,)


def saved_tensors(node: Node) -> Iterator[torch.Tensor]:
    """Yield the tensors that ``node`` keeps in memory, without unpacking: that might recompute them."""
    held = [getattr(saved, "data", None) for saved in raw_saved(node)]
    for value in (*held, *(vars(node).values() if is_python(node) else ())):
        if isinstance(value, torch.Tensor):
            yield value


def unpacks_by_hook(node: Node) -> bool:
    """Return whether a tensor that ``node`` saves is unpacked by a hook, as under ``torch.utils.checkpoint``."""
    hooks: Iterator[Callable[[Any], Any] | None] = (getattr(saved, "unpack_hook", None) for saved in raw_saved(node))
    return any(hook is not None for hook in hooks)
