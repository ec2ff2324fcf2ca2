"""Where a model of transformers can be cut, found by running its forward without weights.

The model is a chain if its blocks are called one after the other, each with the hidden states that the one before
returned, and if nothing else that training changes goes into them. The parts before the first block are one
layer, each block is a layer, and each module behind them. All of this is checked on a tiny batch, on the driver.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from rpcpipe.errors import ModelError
from rpcpipe.model.hf.anatomy import Anatomy, Body, Shortcut
from rpcpipe.model.hf.chain import Beside, Chain
from rpcpipe.model.hf.decoding import cache_of
from rpcpipe.model.hf.probes import (
    WatchedIds,
    ancestors,
    candidates,
    common_path,
    equal_nests,
    has_state,
    is_within,
    stop_here,
    tiny_batch,
)
from rpcpipe.model.hf.recipe import Recipe
from rpcpipe.model.hf.recording import records_routers, unrouted
from rpcpipe.model.hf.skeleton import Handler, Skeleton
from rpcpipe.model.microbatch import tensors

_REFUSED = ("label", "cache", "past", "output_", "encoder_", "embeds", "logits_to_keep", "return_dict", "positions")
_WIDTHS = (0, 1, 2, 3)  # of the tuples that blocks return


def find_blocks(model: nn.Module, name: str) -> tuple[str, tuple[str, ...]]:
    """Return the path of the model's one list of blocks, and the blocks' paths."""
    lists = {path: part for path, part in model.named_modules() if isinstance(part, nn.ModuleList) and has_state(part)}
    outer = {path: part for path, part in lists.items() if not any(path.startswith(f"{other}.") for other in lists)}
    planned = [path for path in outer if path.rpartition(".")[2] in (getattr(model, "_pp_plan", None) or {})]
    found = planned if len(planned) == 1 else list(outer)
    if len(found) != 1:
        raise ModelError(
            f"{name} has {len(found)} lists of blocks ({', '.join(found) or 'none'}), and from_transformers cuts models"
            " with one; write it as a list of layers (docs/guide/models.md)"
        )
    return found[0], tuple(f"{found[0]}.{index}" for index in range(len(outer[found[0]])))


def accepted_inputs(cls: type[PreTrainedModel]) -> tuple[str, ...]:
    """Return the arguments of the class's forward that a batch may have."""
    names = list(inspect.signature(cls.forward).parameters.values())[1:]
    plain = [one.name for one in names if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    return tuple(name for name in plain if not any(word in name for word in _REFUSED) and name != "use_cache")


def anatomy_of(recipe: Recipe) -> Anatomy:
    """Return where the model of ``recipe`` can be cut.

    Raises ModelError, which says what the model does that a chain of layers cannot.
    """
    try:
        with torch.enable_grad():
            return _Examination(recipe).anatomy()
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{recipe.name} cannot be cut: its forward without weights failed with {type(error).__name__}: {error}."
            " Write it as a list of layers (docs/guide/models.md)"
        ) from error


def _is_causal(model: nn.Module, blocks: Sequence[str]) -> bool:
    """Return whether no attention of the blocks says that it sees later tokens (BERT that is no decoder)."""
    parts = [part for path in blocks for part in model.get_submodule(path).modules()]
    return all(getattr(part, name, True) for part in parts for name in ("is_causal", "is_decoder"))


def _has(cache: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(one is cache for one in (*args, *kwargs.values()))


class _Examination:
    """Runs the forward of a model on a tiny batch, to see what its parts are called with."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        model = recipe.weightless()
        if model.config.is_encoder_decoder:
            raise self._error("it has an encoder and a decoder, and a pipeline is one chain of blocks")
        if getattr(model.config, "add_cross_attention", False):
            raise self._error("with cross-attention it has a second input, and a pipeline has one")
        if getattr(model.config.get_text_config(), "num_kv_shared_layers", 0):
            raise self._error("its blocks take keys and values of others (num_kv_shared_layers of its config)")
        if any(getattr(model.config, name, 0) for name in ("layerdrop", "decoder_layerdrop")):
            raise self._error("it leaves blocks out at random (layerdrop of its config); set that to 0")
        path, blocks = find_blocks(model, recipe.name)
        self._causal = _is_causal(model, blocks)
        self._probe = Skeleton(recipe, blocks, torch.device("cpu"), needs_grad=True)
        unrouted(self._probe.model)
        self._body, self._beside = self._how_called(path, blocks)
        before, tail, self._idle = self._phases(list(candidates(model, path)))
        self._tail = tail
        self._embedding, self._children = self._before(model, before, path)
        self._check_direct(model, path)
        self._skeleton = Skeleton(recipe, (*blocks, *tail, *self._idle), torch.device("cpu"), needs_grad=True)
        unrouted(self._skeleton.model)

    def anatomy(self) -> Anatomy:
        live, direct = self._live()
        return Anatomy(
            recipe=self._recipe,
            body=self._body,
            embedding=self._embedding,
            children=self._children,
            tail=self._tail,
            live=live,
            idle=self._idle,
            inputs=accepted_inputs(self._recipe.cls),
            blocks_see_ids=self._blocks_see_ids(),
            tail_sees_ids=self._tail_sees_ids(),
            records=records_routers(self._recipe),
            direct=direct,
            shortcut=self._shortcut(),
            cache=self._cache(),
            causal=self._causal,
            beside=self._beside,
        )

    def _error(self, what: str) -> ModelError:
        return ModelError(f"{self._recipe.name} cannot be cut: {what}")

    def _phases(self, candidates: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """Return the candidates called before the blocks, in order those called behind them, and the others."""
        probe, body = self._probe, self._body
        calls: dict[str, list[bool]] = {candidate: [] for candidate in candidates}
        order: list[str] = []
        reached = False

        def called(candidate: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                calls[candidate].append(reached)
                order.append(candidate)

            return hook

        def block(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal reached
            reached = True
            return body.returned(body.split(args, kwargs)[0])

        for candidate in candidates:
            probe.model.get_submodule(candidate).register_forward_pre_hook(called(candidate))
        probe.run(dict.fromkeys(body.blocks, block), False, **tiny_batch(self._recipe))
        for candidate, phases in calls.items():
            if len(set(phases)) > 1 or (True in phases and len(phases) > 1):
                raise self._error(f"{candidate} is called {len(phases)} times, before and behind its blocks")
        tail = [candidate for candidate in order if calls[candidate] == [True]]
        before = [candidate for candidate, phases in calls.items() if False in phases]
        idle = [candidate for candidate, phases in calls.items() if not phases]
        return tuple(before), tuple(tail), tuple(idle)

    def _before(self, model: nn.Module, before: Sequence[str], path: str) -> tuple[str, tuple[str, ...]]:
        """Return the path of the layer before the blocks, and its children."""
        if not before:
            raise self._error("no module with weights is called before its blocks")
        if len(before) == 1:
            return before[0], ()
        parent = common_path([candidate.rpartition(".")[0] for candidate in before])
        if not parent:
            raise self._error(f"what it does before its blocks is spread over {', '.join(before)}")
        others = {*self._tail, *self._idle, path}
        inner = [name for name, _ in model.get_submodule(parent).named_modules() if name]
        kept = [name for name in inner if not any(is_within(o, f"{parent}.{name}") for o in others)]
        kept = [name for name in kept if not any(is_within(f"{parent}.{name}", o) for o in others)]
        return parent, tuple(
            name for name in kept if not any(is_within(name, other) for other in kept if other != name)
        )

    def _check_direct(self, model: nn.Module, path: str) -> None:
        """Refuse parameters and buffers in the state that are in no module which becomes a layer."""
        for ancestor in ancestors(path):
            if ancestor == self._embedding and self._children:
                continue
            module = model.get_submodule(ancestor)
            own = [name for name in module.state_dict() if "." not in name]
            if own:
                raise self._error(f"{ancestor or 'the model'} itself has the weight {own[0]}")

    def _how_called(self, path: str, blocks: tuple[str, ...]) -> tuple[Body, Beside]:
        reasons: list[Exception] = []
        for width in _WIDTHS:
            try:
                return Chain(self._recipe, Body(path, blocks, width=width)).check(self._probe)
            except Exception as error:
                reasons.append(error)
        said = next((one for one in reversed(reasons) if isinstance(one, ModelError)), None)
        raise said or reasons[0]

    def _run(self, body: Body, handlers: Mapping[str, Handler], **more: Any) -> Any:
        return self._skeleton.run(handlers, False, **{**tiny_batch(self._recipe), **more})

    def _live(self) -> tuple[tuple[tuple[int, ...], ...], tuple[bool, ...]]:
        """Return for every module behind the blocks which earlier results go into it or a later one.

        And whether it is called with the result before it alone.
        """
        results: list[Any] = []
        direct: list[bool] = []
        uses: list[set[int]] = []
        body = self._body

        def leaf(value: Any) -> Any:
            fresh = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().float().requires_grad_(), value)
            results.append(fresh)
            return fresh

        def last(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return body.returned(leaf(body.split(args, kwargs)[0]))

        def behind(path: str) -> Handler:
            def module(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                uses.append(self._used(results, (args, kwargs)))
                direct.append(not kwargs and len(args) == 1 and args[0] is results[-1])
                return leaf(self._skeleton.hollow(path)(*args, **kwargs))

            return module

        output = self._run(
            body, {**self._body.passing(), body.blocks[-1]: last, **{path: behind(path) for path in self._tail}}
        )
        uses.append(self._used(results, output))
        needed: set[int] = set()
        live = []
        for index in reversed(range(len(self._tail))):
            needed |= {use - 1 for use in uses[index + 1]} | {use - 1 for use in uses[index]}
            needed = {use for use in needed if use < index}
            live.append(tuple(sorted(needed)))
        return tuple(reversed(live)), tuple(direct)

    def _shortcut(self) -> Shortcut | None:
        """Return how the forward can begin behind the module of the model that has the blocks."""
        inside = [one for one in self._tail if is_within(one, self._body.path.split(".")[0])]
        if len(inside) != len(self._tail) - 1:
            return None
        marked: list[Any] = []

        def last(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            marked.append(self._body.split(args, kwargs)[0])
            return self._body.returned(marked[-1])

        def behind(part: str) -> Handler:
            def module(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                marked.append(self._skeleton.hollow(part)(*args, **kwargs))
                return marked[-1]

            return module

        returned: dict[str, Any] = {}
        names = [name for name in ancestors(self._body.path) if name]
        hooks = [
            self._skeleton.model.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name: returned.setdefault(name, output)
            )
            for name in names
        ]
        handlers = {**self._body.passing(), self._body.blocks[-1]: last, **{part: behind(part) for part in inside}}
        self._run(self._body, {**handlers, self._tail[-1]: stop_here})
        for hook in hooks:
            hook.remove()
        for name in names:  # from the outermost
            output = returned.get(name)
            found = {key: item for key, item in output.items() if item is not None} if isinstance(output, dict) else {}
            if len(found) == 1 and (key := next(iter(found))) and found[key] is marked[-1]:
                return Shortcut(name, type(output), key)
        return None

    def _used(self, results: Sequence[Any], value: Any) -> set[int]:
        """Return which of ``results`` the tensors in ``value`` depend on; refuse weights before the blocks."""
        roots = [leaf.float().sum() for leaf in tensors(value) if leaf.requires_grad]
        if not roots:
            return set()
        weights = [one for one in self._skeleton.model.parameters() if one.requires_grad]
        leaves = [(index, leaf) for index, result in enumerate(results) for leaf in tensors(result)]
        sought = [leaf for _, leaf in leaves] + weights
        gradients = torch.autograd.grad(torch.stack(roots).sum(), sought, allow_unused=True, retain_graph=True)
        if any(gradient is not None for gradient in gradients[len(leaves) :]):
            raise self._error("what it does behind its blocks uses weights of the part before them")
        return {index for (index, _), gradient in zip(leaves, gradients, strict=False) if gradient is not None}

    def _arguments(self, **inputs: Any) -> list[Any]:
        recorded: list[Any] = []
        body = self._body

        def block(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden, *others = body.split(args, kwargs)
            recorded.append((hidden.shape[:2], others))
            return body.returned(hidden)

        self._run(body, {**dict.fromkeys(body.blocks, block), **dict.fromkeys(self._tail, stop_here)}, **inputs)
        return recorded

    def _cache(self) -> str:
        """Return the argument for a key-value cache, if every block takes the cache and nothing else is kept."""
        arguments = inspect.signature(self._recipe.cls.forward).parameters
        name = next((one for one in ("cache", "past_key_values") if one in arguments), "")
        cache = cache_of(self._recipe.config, len(self._body.blocks)) if name else None
        if cache is None or "attention_mask" not in arguments or any(self._beside) or not self._causal:
            return ""
        with torch.no_grad():
            calls = self._arguments(**{name: cache, "use_cache": True})
        return name if all(_has(cache, args, kwargs) for _, (args, kwargs) in calls) else ""

    def _blocks_see_ids(self) -> bool:
        """Return whether other input_ids of the same shape would change what the blocks are called with."""
        ids = tiny_batch(self._recipe)["input_ids"]
        mask = torch.ones_like(ids).index_fill(1, torch.tensor([ids.shape[1] - 1]), 0)
        zeros = torch.zeros_like(ids)
        return not all(
            equal_nests(self._arguments(**more), self._arguments(**{**more, "input_ids": zeros}))
            for more in ({}, {"attention_mask": mask})
        ) or any(shape != ids.shape for shape, _ in self._arguments())

    def _tail_sees_ids(self) -> bool:
        """Return whether input_ids are used after the last block was called."""
        ids = tiny_batch(self._recipe)["input_ids"].as_subclass(WatchedIds)
        WatchedIds.used = False

        def last(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            WatchedIds.used = False
            return self._body.returned(self._body.split(args, kwargs)[0].as_subclass(torch.Tensor))

        def behind(path: str) -> Handler:
            return lambda args, kwargs: self._skeleton.hollow(path)(*args, **kwargs)

        handlers = {**self._body.passing(), self._body.blocks[-1]: last, **{path: behind(path) for path in self._tail}}
        self._run(self._body, handlers, input_ids=ids)
        return WatchedIds.used
