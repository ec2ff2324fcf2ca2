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

from rpcpipe.errors import ModelError, ScheduleError
from rpcpipe.stage.autograd import Saved
from rpcpipe.stage.graph import is_python, leaf_of, nodes_below, unpacks_by_hook
from rpcpipe.stage.trainable import Parts


class Audit:
    """The checks of one stage. ``recomputes``: a backward may run layers again, as under ``torch.utils.checkpoint``."""

    def __init__(self, module: nn.Sequential) -> None:
        self.recomputes = False
        self._module = module
        self.forwards = 0
        self._forwarded = False
        self._seen: set[str] = set()
        self._writes = ""  # a buffer that a backward changes

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Raise ModelError if the stage's first forward changes or makes a parameter; all are then as before."""
        self.forwards += 1
        if self._forwarded:
            yield
            return
        before = {name: (weight, weight.detach().clone()) for name, weight in self._module.named_parameters()}
        parts = Parts(self._module)
        yield
        if made := parts.added():
            parts.restore()
            raise ModelError(
                f"the forward makes the parameter {made[0]}, and the optimizer was made before: it would not be"
                " trained; make it in the constructor, or run the model once on a sample before the pipeline is made"
            )
        changed = [name for name, (weight, value) in before.items() if not torch.equal(weight, value)]
        if changed:
            with torch.no_grad():
                for name in changed:
                    before[name][0].copy_(before[name][1])
            raise ModelError(
                f"the forward changes the parameter {changed[0]}: a step that fails could not take that back, and"
                " copies of a weight on other workers would part; use a buffer, or change it between two steps by"
                " pipe.stages[k].call(…)"
            )
        self._forwarded = True

    @contextmanager
    def backward(self, what: str, *, alone: bool) -> Iterator[None]:
        """Raise ModelError if a backward of the kind ``what`` does what depends on the schedule.

        That is to draw random numbers, looked for in the first one; and to change a buffer, unless the backward is
        ``alone``: it follows its own forward at once, as in a plain loop.
        """
        if what in self._seen:
            if self._writes and not alone:
                raise ModelError(_writes(self._writes))
            yield
            return
        random, buffers = torch.default_generator.get_state(), self._buffers()
        yield
        if not torch.equal(random, torch.default_generator.get_state()):
            raise ModelError(
                "the backward draws random numbers from torch's default generator; which ones would depend on the"
                " schedule and on where the model is cut: draw them in the forward, or from a torch.Generator that the"
                " layer makes"
            )
        self._writes = next((name for name, bits in self._buffers().items() if not _same(bits, buffers.get(name))), "")
        if self._writes and not alone:
            raise ModelError(_writes(self._writes))
        self._seen.add(what)

    def _buffers(self) -> dict[str, torch.Tensor]:
        """Return the bits of every buffer: a NaN equals itself."""
        return {
            name: buffer.detach().contiguous().reshape(-1).view(torch.uint8).clone()
            for name, buffer in self._module.named_buffers()
            if buffer.layout is torch.strided
        }

    def graph(self, saved: Saved, leaves: Collection[torch.Tensor]) -> None:
        """Raise ModelError if a parameter was used that is not among ``leaves``, the stage's.

        If it is one of the stage's, whose version was to be used, raise ScheduleError.
        """
        entry = {edge.node for edge in saved.entered.edges}
        nodes = nodes_below([edge.node for edge in saved.outputs], entry)
        self.recomputes = self.recomputes or any(is_python(node) or unpacks_by_hook(node) for node in nodes)
        for leaf in map(leaf_of, nodes):
            if isinstance(leaf, nn.Parameter) and leaf not in leaves:
                raise self._foreign(leaf)

    def _foreign(self, leaf: nn.Parameter) -> ModelError | ScheduleError:
        """Return the error that says where the parameter comes from and what to do."""
        shape = f"a parameter of shape {tuple(leaf.shape)}"
        own = [name for name, parameter in self._module.named_parameters() if parameter is leaf]
        if own:
            return ScheduleError(
                f"{own[0]} was not read as its module's attribute (but from a list, or a variable), so a schedule that"
                " keeps versions of the weights cannot replace it: read it as the attribute, or use a synchronous"
                " schedule"
            )
        holders = [name for name, module in self._module.named_modules() if _refers(vars(module).values(), leaf)]
        if holders:
            return ModelError(
                f"{holders[0]} uses {shape} that is not registered with it; no optimizer updates it, and if it is"
                " another layer's this is a copy: make it an attribute, in an nn.ParameterList if it is in a list, or"
                " tie it (LayerSpec(tied=…))"
            )
        return ModelError(
            f"the loss, or a function that a layer calls, uses {shape} that no layer here has: what it refers to on a"
            " worker is a copy that nobody updates; make it a part of a layer (and take it to the loss in the output)"
        )


def _same(bits: torch.Tensor, before: torch.Tensor | None) -> bool:
    return before is not None and torch.equal(bits, before)


def _writes(name: str) -> str:
    return (
        f"the backward changes the buffer {name}, and forwards of other micro-batches ran between it and its own: what"
        " they read, and what the buffer becomes, would depend on the schedule. If the layer uses"
        " torch.utils.checkpoint, use the pipeline's checkpoint= in its place; if a hook or a custom Function does it,"
        " hold what no forward reads in an attribute that is not a buffer; or use schedule='naive'"
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
