"""Tensors that tell what a model's forward does with them, and questions about a model's modules."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from rpcpipe.model.hf.recipe import Recipe
from rpcpipe.model.hf.skeleton import Reached

_ROWS, _TIME = 2, 6


class WatchedIds(torch.Tensor):
    """Token ids that say whether they were used; what is computed from them is an ordinary tensor."""

    used = False

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.used = True
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def stop_here(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """End the forward."""
    raise Reached()


def tiny_batch(recipe: Recipe) -> dict[str, Any]:
    """Return a tiny batch of token ids, among them the one that pads."""
    vocabulary = recipe.config.get_text_config().vocab_size
    most = getattr(recipe.config.get_text_config(), "max_position_embeddings", None)
    time = min(_TIME, most) if isinstance(most, int) and most > 0 else _TIME
    ids = torch.arange(_ROWS * time).reshape(_ROWS, time) % min(vocabulary, 1 << 15)
    pad = getattr(recipe.config.get_text_config(), "pad_token_id", None)
    if isinstance(pad, int) and 0 <= pad < vocabulary:
        ids[0, -1] = pad
    return {"input_ids": ids}


def is_within(path: str, other: str) -> bool:
    """Return whether ``path`` is ``other`` or below it."""
    return f"{path}.".startswith(f"{other}.")


def common_path(paths: Sequence[str]) -> str:
    """Return the longest path that all ``paths`` are within."""
    names = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(one[0] for one in itertools.takewhile(lambda several: len(set(several)) == 1, names))


def ancestors(path: str) -> list[str]:
    """Return the paths of the modules that ``path`` is below, from the model's own, ""."""
    names = path.split(".")[:-1]
    return [".".join(names[:count]) for count in range(len(names) + 1)]


def candidates(model: nn.Module, blocks: str) -> Iterator[str]:
    """Yield the paths of the modules with weights beside those on the way to ``blocks``."""
    for ancestor in ancestors(blocks):
        for name, child in model.get_submodule(ancestor).named_children():
            path = f"{ancestor}.{name}" if ancestor else name
            if not is_within(blocks, path) and has_state(child):
                yield path


def equal_nests(one: Any, other: Any) -> bool:
    """Return whether two nests have the same form and equal leaves."""
    a, b = pytree.tree_flatten(one), pytree.tree_flatten(other)
    return a[1] == b[1] and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) else x is y or x == y
        for x, y in zip(a[0], b[0], strict=True)
    )


def has_state(module: nn.Module) -> bool:
    """Return whether ``module`` has a part in the model's ``state_dict``."""
    return bool(module.state_dict(keep_vars=True))
