"""Whether the blocks of a model are a chain: each is called with what the one before it returned."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from rpcpipe.errors import ModelError
from rpcpipe.model.hf.anatomy import Body
from rpcpipe.model.hf.probes import tiny_batch
from rpcpipe.model.hf.recipe import Recipe
from rpcpipe.model.hf.skeleton import Handler, Reached, Skeleton

# For every block: the leaves of its other arguments that depend on weights, and which value each of them is.
Beside = tuple[tuple[tuple[int, int], ...], ...]

_OTHER = object()  # what a block returns beside its hidden states


class Chain:
    """The blocks of ``body``, called one after the other in a forward without weights."""

    def __init__(self, recipe: Recipe, body: Body) -> None:
        self._recipe = recipe
        self._body = body
        self._returned: list[torch.Tensor] = []
        self._names: list[str] = []
        self._values: dict[int, tuple[int, torch.Tensor]] = {}
        self._beside: list[tuple[tuple[int, int], ...]] = []

    def check(self, probe: Skeleton) -> tuple[Body, Beside]:
        """Return the body with the name of its argument, and the values that its blocks take beside it.

        Raises ModelError if the blocks are no chain, and whatever the model's forward raises if it does not take
        what they return.
        """
        names, blocks = self._names, self._body.blocks
        handlers = {path: self._block(index) for index, path in enumerate(blocks)}
        probe.run(handlers, False, **tiny_batch(self._recipe))
        if len(names) != len(blocks) or len(set(names)) > 1:
            raise self._error(f"{len(names)} of its {len(blocks)} blocks are called")
        return Body(self._body.path, blocks, names[0], self._body.width), tuple(self._beside)

    def _error(self, what: str) -> ModelError:
        return ModelError(f"{self._recipe.name} cannot be cut: {what}")

    def _block(self, index: int) -> Handler:
        def block(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            name = "" if args else next(iter(kwargs))
            hidden = args[0] if args else kwargs[name]
            self._names.append(name)
            if len(self._names) != index + 1 or (self._returned and self._returned[-1] is not hidden):
                raise self._error(
                    f"its block {len(self._names) - 1} is not called with what the one before it returned alone"
                )
            others = Body(self._body.path, self._body.blocks, name).split(args, kwargs)[1:]
            self._beside.append(tuple(self._taken(index, others)))
            self._returned.append(hidden.detach().clone().requires_grad_())
            if index == len(self._body.blocks) - 1:
                raise Reached()
            return self._body.returned(self._returned[-1], _OTHER)

        return block

    def _taken(self, index: int, others: Any) -> list[tuple[int, int]]:
        """Return which leaves of ``others`` depend on weights, and the numbers of their values."""
        taken = []
        for place, leaf in enumerate(pytree.tree_leaves(others)):
            if leaf is _OTHER or (isinstance(leaf, torch.Tensor) and self._of_blocks(leaf)):
                raise self._error(f"its blocks hand more than hidden states to each other (block {index} takes it)")
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                number, _ = self._values.setdefault(id(leaf), (len(self._values), leaf))  # kept: its id stays its own
                taken.append((place, number))
        return taken

    def _of_blocks(self, leaf: torch.Tensor) -> bool:
        if not leaf.requires_grad or not self._returned:
            return False
        gradients = torch.autograd.grad(leaf.float().sum(), self._returned, allow_unused=True, retain_graph=True)
        return any(gradient is not None for gradient in gradients)
