"""What a stage's layers must not do, looked for on its first micro-batches, before any weight is updated.

Each of these would train on without an error, and differ from one process: on a worker the loss and the layers are
copies, backwards of different stages run in an order of their own, and a failed step must change nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rpcpipe.stage.autograd import Saved
from rpcpipe.stage.graph import is_python, nodes_below, unpacks_by_hook


class Audit:
    """The checks of one stage. ``recomputes``: a backward may run layers again, as under ``torch.utils.checkpoint``."""

    def __init__(self, module: nn.Sequential) -> None:
        self.recomputes = False
        self._module = module
        self._forwarded = False
        self._drawn: set[str] = set()

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Raise RuntimeError if the stage's first forward changes a parameter, which then has its value back."""
        if self._forwarded:
            yield
            return
        before = {name: (weight, weight.detach().clone()) for name, weight in self._module.named_parameters()}
        yield
        changed = [name for name, (weight, value) in before.items() if not torch.equal(weight, value)]
        if changed:
            with torch.no_grad():
                for name in changed:
                    before[name][0].copy_(before[name][1])
            raise RuntimeError(
                f"the forward changes the parameter {changed[0]}: a step that fails could not take that back, and"
                " copies of a weight on other workers would part; use a buffer, or change it between two steps by"
                " pipe.stages[k].call(…)"
            )
        self._forwarded = True

    @contextmanager
    def backward(self, what: str) -> Iterator[None]:
        """Raise RuntimeError if the stage's first backward of the kind ``what`` draws random numbers."""
        if what in self._drawn:
            yield
            return
        before = torch.default_generator.get_state()
        yield
        if not torch.equal(before, torch.default_generator.get_state()):
            raise RuntimeError(
                "the backward draws random numbers from torch's default generator; which ones would depend on the"
                " schedule and on where the model is cut: draw them in the forward, or from a torch.Generator that the"
                " layer makes"
            )
        self._drawn.add(what)

    def graph(self, saved: Saved, leaves: Collection[torch.Tensor]) -> None:
        """Raise RuntimeError if a parameter was used that is not among ``leaves``, the stage's."""
        entry = {edge.node for edge in saved.entered.edges}
        nodes = nodes_below([edge.node for edge in saved.outputs], entry)
        self.recomputes = self.recomputes or any(is_python(node) or unpacks_by_hook(node) for node in nodes)
        for leaf in (node.variable for node in nodes if hasattr(node, "variable")):
            if isinstance(leaf, nn.Parameter) and leaf not in leaves:
                raise RuntimeError(self._describe(leaf))

    def _describe(self, leaf: nn.Parameter) -> str:
        """Say where the parameter comes from and what to do."""
        shape = f"a parameter of shape {tuple(leaf.shape)}"
        own = [name for name, parameter in self._module.named_parameters() if parameter is leaf]
        if own:
            return (
                f"{own[0]} was not read as its module's attribute (but from a list, or a variable), so a schedule that"
                " keeps versions of the weights cannot replace it: read it as the attribute, or use a synchronous"
                " schedule"
            )
        holders = [name for name, module in self._module.named_modules() if _refers(vars(module).values(), leaf)]
        if holders:
            return (
                f"{holders[0]} uses {shape} that is not registered with it; no optimizer updates it, and if it is"
                " another layer's this is a copy: make it an attribute, in an nn.ParameterList if it is in a list, or"
                " tie it (LayerSpec(tied=…))"
            )
        return (
            f"the loss, or a function that a layer calls, uses {shape} that no layer here has: what it refers to on a"
            " worker is a copy that nobody updates; make it a part of a layer (and take it to the loss in the output)"
        )


def _refers(values: Iterable[Any], leaf: nn.Parameter) -> bool:
    """Return whether ``leaf`` is among ``values``, or in a list, tuple or dict among them."""
    for value in values:
        if value is leaf:
            return True
        if isinstance(value, dict) and _refers(value.values(), leaf):
            return True
        if isinstance(value, (list, tuple)) and _refers(value, leaf):
            return True
    return False
