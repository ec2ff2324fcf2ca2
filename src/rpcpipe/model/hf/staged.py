"""Parts of a model of transformers as layers of a pipeline: each calls its module as the unsplit model's forward does.

The layers are the model's modules, with the same parameters under the same names. Beside the hidden states they take
the model's other inputs (masks, position ids), from which every stage makes the arguments of its blocks once for each
micro-batch; masks of (time × time) are never sent.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers.utils import output_capturing

from rpcpipe.errors import ArgumentError, ModelError
from rpcpipe.model.hf.anatomy import Anatomy
from rpcpipe.model.hf.decoding import Decoding
from rpcpipe.model.hf.recording import record_routers, with_routers
from rpcpipe.model.hf.skeleton import Handler, Reached, Skeleton, remembered, skeleton
from rpcpipe.model.language_model import CACHED

INPUTS = "model_inputs"  # the name of the wire that carries a micro-batch's inputs behind the embedding
_DROPPED = ("loss", "cache", "past_key_values", "hidden_states", "attentions", "router_logits")


class _OnStage:
    """The forward of a module as a layer: what the part that it is of the model says."""

    rpcpipe_part: Any

    def forward(self, *flow: Any) -> Any:
        return self.rpcpipe_part(self, super().forward, *flow)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (type(self).__mro__[2],), vars(self)


@functools.cache
def _class_on_stage(cls: Any) -> Any:
    """Return the subclass of ``cls``, a class of modules, whose forward is that of a layer."""
    return type(cls.__name__, (_OnStage, cls), {"__module__": cls.__module__})


def _blank(cls: Any) -> nn.Module:
    on_stage = _class_on_stage(cls)
    module: nn.Module = on_stage.__new__(on_stage)
    return module


def on_stage(module: nn.Module, part: Any) -> nn.Module:
    """Return ``module`` as the layer ``part``, with the same parameters, submodules and buffers."""
    staged = copy.copy(_uncaptured(module))
    if hasattr(staged, "gradient_checkpointing"):
        vars(staged)["gradient_checkpointing"] = False  # the pipeline's ``checkpoint`` decides on recomputation
    kind: Any = type(module)
    staged.__class__ = _class_on_stage(kind)
    vars(staged)["rpcpipe_part"] = part
    return staged


def _uncaptured(module: nn.Module) -> nn.Module:
    """Return ``module``, or a copy with the same parameters, without hooks by which transformers records outputs.

    A model has them once it was called for router logits, and they cannot be sent.
    """
    hooks = vars(module)["_forward_hooks"]
    kept = {key: hook for key, hook in hooks.items() if getattr(hook, "__module__", "") != output_capturing.__name__}
    children = {name: child and _uncaptured(child) for name, child in vars(module)["_modules"].items()}
    if len(kept) == len(hooks) and all(
        child is module.get_submodule(name) for name, child in children.items() if child
    ):
        return module
    bare = copy.copy(module)
    vars(bare).update(_modules=children, _forward_hooks=OrderedDict(kept))
    return bare


def skeleton_of(anatomy: Anatomy, device: torch.device) -> Skeleton:
    """Return this thread's skeleton of the model on ``device``."""
    return skeleton(anatomy.recipe, anatomy.stand_ins, device)


@dataclass(frozen=True)
class Embedding:
    """The part of the forward before the first block."""

    anatomy: Anatomy

    def __call__(self, module: nn.Module, forward: Callable[..., Any], inputs: Any) -> tuple[Any, ...]:
        given = _checked(inputs, self.anatomy)
        skeleton = skeleton_of(self.anatomy, given["input_ids"].device)

        seen: dict[int, torch.Tensor] = {}
        path, children = self.anatomy.embedding, self.anatomy.children
        parts = {f"{path}.{name}": module.get_submodule(name) for name in children}
        with skeleton.having(parts or {path: _Called(forward, module)}):
            cached = _with_cache(self.anatomy, skeleton, given, given["input_ids"])
            hidden = skeleton.run(_entered(self.anatomy, seen), module.training, **cached)
        if not self.anatomy.blocks_see_ids:
            given = {name: value for name, value in given.items() if name != "input_ids"}
        flow = (hidden, ()) if self.anatomy.records else hidden
        return flow, given, *(seen[value] for value in self.anatomy.values)


def _entered(anatomy: Anatomy, seen: dict[int, torch.Tensor]) -> dict[str, Handler]:
    """Return handlers of blocks that find the first hidden states, and in ``seen`` the values that go beside them."""
    body, last = anatomy.body, max((index for index, leaves in enumerate(anatomy.beside) if leaves), default=0)
    entering: list[Any] = []

    def block(index: int) -> Handler:
        def called(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden, *others = body.split(args, kwargs)
            entering.append(hidden)
            leaves = pytree.tree_leaves(tuple(others))
            seen.update((value, leaves[place]) for place, value in anatomy.beside[index])
            if index == last:
                raise Reached(entering[0])
            return body.returned(hidden)

        return called

    return {path: block(index) for index, path in enumerate(body.blocks[: last + 1])}


class _Called(nn.Module):
    """Calls ``function``, the forward of ``module``, and has the attributes of it."""

    def __init__(self, function: Callable[..., Any], module: nn.Module) -> None:
        super().__init__()
        self.function = function
        vars(self)["original"] = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["original"], name)


@dataclass(frozen=True)
class Block:
    """The block ``index``."""

    anatomy: Anatomy
    index: int

    def __call__(
        self, module: nn.Module, forward: Callable[..., Any], x: Any, inputs: Mapping[str, Any], *beside: Any
    ) -> Any:
        body = self.anatomy.body
        hidden, before = x if self.anatomy.records else (x, ())
        args, kwargs = arguments(self.anatomy, hidden, inputs, self.index)
        args, kwargs = self._with(beside, args, kwargs)
        if body.hidden:
            kwargs = {**kwargs, body.hidden: hidden}
        else:
            args = (hidden, *args)
        if not self.anatomy.records:
            return _hidden(forward(*args, **kwargs))
        with record_routers(module, self.anatomy.recipe) as routers:
            result = forward(*args, **kwargs)
        return _hidden(result), (*before, *routers)

    @property
    def values(self) -> tuple[int, ...]:
        """The numbers of the values that the block takes."""
        return tuple(sorted({value for _, value in self.anatomy.beside[self.index]}))

    def _with(
        self, beside: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with the values from the part before the blocks in their places."""
        if not beside:
            return args, kwargs
        known = dict(zip(self.values, beside, strict=True))
        leaves, form = pytree.tree_flatten((args, kwargs))
        for place, value in self.anatomy.beside[self.index]:
            leaves[place] = known[value]
        filled: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(leaves, form)
        return filled


def _hidden(result: Any) -> Any:
    return result[0] if isinstance(result, (tuple, list)) else result


def arguments(
    anatomy: Anatomy, hidden: torch.Tensor, inputs: Mapping[str, Any], index: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what block ``index`` is called with beside ``hidden``, (batch, time, …), for a batch of ``inputs``.

    The blocks of a stage have the same ``inputs``, so what was found for the last of them is kept.
    """
    skeleton = skeleton_of(anatomy, hidden.device)
    decoding = _decoding(anatomy, skeleton, inputs, hidden)
    if decoding is not None:
        return _of_pass(anatomy, skeleton, decoding, hidden, inputs, index)
    key = (hidden.shape, hidden.dtype, *((name, id(value)) for name, value in inputs.items()))

    def make() -> Any:
        return dict(inputs), _arguments(anatomy, skeleton, hidden, inputs)  # the inputs too: their ids stay theirs

    return remembered(skeleton.memo, key, make)[1][index]


def _of_pass(
    anatomy: Anatomy,
    skeleton: Skeleton,
    decoding: Decoding,
    hidden: torch.Tensor,
    inputs: Mapping[str, Any],
    index: int,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of block ``index`` in a pass over new tokens, with its own cache."""
    if decoding.arguments is None:
        decoding.arguments = _arguments(anatomy, skeleton, hidden, inputs)
    args, kwargs = decoding.arguments[index]
    cache = decoding.wide(index)
    return (
        tuple(cache if one is decoding.narrow else one for one in args),
        {name: cache if one is decoding.narrow else one for name, one in kwargs.items()},
    )


def _decoding(anatomy: Anatomy, skeleton: Skeleton, inputs: Mapping[str, Any], tokens: torch.Tensor) -> Decoding | None:
    return skeleton.decodings.current(anatomy.recipe.config, len(anatomy.body.blocks), inputs, tokens.shape[1])


def _with_cache(
    anatomy: Anatomy, skeleton: Skeleton, inputs: Mapping[str, Any], tokens: torch.Tensor
) -> dict[str, Any]:
    """Return ``inputs`` as the model's forward takes them, with the cache if there is one for these rows."""
    given = {name: value for name, value in inputs.items() if name != CACHED}
    decoding = _decoding(anatomy, skeleton, inputs, tokens)
    return given if decoding is None else {**given, anatomy.cache: decoding.narrow, "use_cache": True}


def _arguments(anatomy: Anatomy, skeleton: Skeleton, hidden: torch.Tensor, inputs: Mapping[str, Any]) -> list[Any]:
    found: list[Any] = []
    body = anatomy.body

    def block(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        states, *others = body.split(args, kwargs)
        found.append(tuple(others))
        if len(found) == len(body.blocks):
            raise Reached()
        return body.returned(states)

    with torch.no_grad():
        given = _with_cache(anatomy, skeleton, _with_ids(hidden, inputs), hidden)
        skeleton.run(dict.fromkeys(body.blocks, block), False, **given)
    return found


def _with_ids(hidden: torch.Tensor, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``inputs`` with token ids, where nothing but their shape matters."""
    zeros = torch.zeros((), dtype=torch.long, device=hidden.device)
    return {"input_ids": zeros.expand(hidden.shape[:2]), **inputs}


@dataclass(frozen=True)
class Tail:
    """The module ``index`` of those behind the blocks; the last one returns what the model does."""

    anatomy: Anatomy
    index: int

    def __call__(
        self, module: nn.Module, forward: Callable[..., Any], x: Any, inputs: Mapping[str, Any], ids: Any = None
    ) -> Any:
        anatomy = self.anatomy
        carried, routers = x if anatomy.records else (x, ())
        live = anatomy.live[self.index]
        results = dict(zip(live, carried if len(live) != 1 else (carried,), strict=True))
        if self.index < len(anatomy.tail) - 1:
            return self._before_last(module, forward, results, inputs, routers)
        skeleton, given = self._begun(results, inputs)
        given |= {} if ids is None else {"input_ids": ids}
        handlers = {**_behind(anatomy, results), anatomy.tail[-1]: lambda args, kwargs: forward(*args, **kwargs)}
        with self._body_returning(skeleton, results, routers):
            return outputs(skeleton.run(handlers, module.training, **given))

    def _begun(self, results: Mapping[int, Any], inputs: Mapping[str, Any]) -> tuple[Skeleton, dict[str, Any]]:
        sample = next(iter(results.values()))
        skeleton = skeleton_of(self.anatomy, sample.device)
        return skeleton, _with_cache(self.anatomy, skeleton, _with_ids(sample, inputs), sample)

    def _before_last(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        results: dict[int, Any],
        inputs: Mapping[str, Any],
        routers: tuple[Any, ...],
    ) -> Any:
        """Return what the next module takes: the results that are needed from there on."""
        anatomy = self.anatomy

        def here(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            raise Reached(forward(*args, **kwargs))

        if anatomy.direct[self.index]:
            results[self.index] = forward(results[self.index - 1])
        else:
            skeleton, given = self._begun(results, inputs)
            handlers = {**_behind(anatomy, results), anatomy.tail[self.index]: here}
            results[self.index] = skeleton.run(handlers, module.training, **given)
        kept = tuple(results[one] for one in anatomy.live[self.index + 1])
        flow = kept if len(kept) != 1 else kept[0]
        return (flow, routers) if anatomy.records else flow

    def _body_returning(
        self, skeleton: Skeleton, results: Mapping[int, Any], routers: tuple[Any, ...]
    ) -> AbstractContextManager[None]:
        """Let the skeleton's module with the blocks return what is known of its output, inside the block."""
        shortcut = self.anatomy.shortcut
        path = self.anatomy.body.owner if shortcut is None else shortcut.path
        forward: Callable[..., Any] | None = None
        if shortcut is not None:
            (result,) = results.values()

            def forward(*args: Any, **kwargs: Any) -> Any:
                return shortcut.output(result)

        if routers:
            forward = with_routers(forward or skeleton.model.get_submodule(path).forward, routers)
        return skeleton.returning(path, forward)


def _behind(anatomy: Anatomy, results: Mapping[int, Any]) -> dict[str, Handler]:
    """Return handlers of blocks and of modules behind them that return their ``results``, or what they are given."""
    body = anatomy.body

    def known(result: Any) -> Handler:
        return lambda args, kwargs: result

    handlers = body.passing()
    handlers |= {path: lambda args, kwargs: args[0] if args else None for path in anatomy.tail}
    if -1 in results:
        handlers[body.blocks[-1]] = known(body.returned(results[-1]))
    return handlers | {anatomy.tail[index]: known(result) for index, result in results.items() if index >= 0}


@dataclass(frozen=True)
class Idle:
    """A module that the model has and does not call."""

    def __call__(self, module: nn.Module, forward: Callable[..., Any], x: Any) -> Any:
        return x


def outputs(result: Any) -> Any:
    """Return the tensors of a model's output by their names, or the tensor if it is one."""
    if isinstance(result, torch.Tensor):
        return result
    if not isinstance(result, Mapping):
        raise ModelError(f"the model returns a {type(result).__name__}; its outputs must have names")
    named = {name: value for name, value in result.items() if name not in _DROPPED and isinstance(value, torch.Tensor)}
    return next(iter(named.values())) if len(named) == 1 else named


def _checked(inputs: Any, anatomy: Anatomy) -> dict[str, Any]:
    """Return the inputs without those that are None; raises ArgumentError unless the model takes them."""
    names = anatomy.inputs
    known = {*names, CACHED}
    if not isinstance(inputs, Mapping) or "input_ids" not in inputs or not inputs.keys() <= known:
        actual = sorted(inputs) if isinstance(inputs, Mapping) else f"a {type(inputs).__name__}"
        raise ArgumentError(f"inputs must be a dict with input_ids and at most {', '.join(names)}, not {actual}")
    return {name: value for name, value in inputs.items() if value is not None}
