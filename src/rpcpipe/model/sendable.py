"""Tensors that can be sent between processes: what torch RPC would lose or die of is made sound, or refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rpcpipe.errors import ArgumentError, ModelError, RpcPipeError
from rpcpipe.model import nest_types
from rpcpipe.model.microbatch import Nest, flatten, unflatten
from rpcpipe.transport.message_pickling import in_bounds

_ORDINARY = (torch.Tensor, nn.Parameter)
_NO_DISPATCH = torch.Tensor.__torch_dispatch__
# What else to do about what a layer has made.
_ONE_STAGE = ", or keep what makes and what takes it in one stage"


def sendable(tensor: torch.Tensor, source: str) -> torch.Tensor:
    """Return ``tensor`` in a form that arrives as it is; raises ModelError for a kind that cannot be sent.

    ``source`` names who gives it. Keeps the autograd graph.
    """
    if type(tensor) not in _ORDINARY or tensor.layout is not torch.strided or tensor.is_meta or tensor.is_nested:
        _check_kind(tensor, source)
        return tensor
    if tensor.is_conj() or tensor.is_neg():
        return tensor.resolve_conj().resolve_neg()
    return tensor if tensor.numel() else in_bounds(tensor)


def _check_kind(tensor: torch.Tensor, source: str) -> None:
    kind, advice = "", ""
    if type(tensor) not in _ORDINARY and type(tensor).__torch_dispatch__ is not _NO_DISPATCH:
        kind, advice = f"a {type(tensor).__name__}", "an ordinary tensor"
    elif tensor.is_nested:
        kind, advice = "a nested tensor", "its parts as a list, or padded"
    elif tensor.is_meta:
        kind, advice = "a tensor on the meta device, which has no values,", "a tensor with values"
    elif tensor.layout is torch._mkldnn:  # type: ignore[attr-defined]
        kind, advice = "a tensor in the layout of mkldnn", "its to_dense()"
    elif tensor.layout is not torch.strided and tensor.requires_grad:
        kind, advice = "a sparse tensor that requires a gradient", "its to_dense()"
    if kind:
        raise ModelError(
            f"{source} has {kind} that would have to be sent to another process; give {advice}{_ONE_STAGE}"
        )


def checked(nest: Nest, source: str, change: Any = None) -> Nest:
    """Return ``nest`` with every tensor ``sendable``, then ``change``d; raises ModelError for what cannot be sent."""
    if nest_types.collect_builtin(nest, []):
        return nest_types.map_builtin(lambda leaf: _sound(leaf, source, change), nest)
    leaves, spec = flatten(nest)
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            leaves[index] = _sound(leaf, source, change)
        elif type(leaf) not in nest_types.plain:
            nest_types.check_leaf(leaf, source)
    return unflatten(leaves, spec)


@contextmanager
def as_argument(kind: type[RpcPipeError] = ArgumentError) -> Iterator[None]:
    """Raise what the block refuses to send as an error of ``kind``: the user gave it, and no layer made it."""
    try:
        yield
    except ModelError as error:
        raise kind(str(error).removesuffix(_ONE_STAGE)) from None


def _sound(tensor: torch.Tensor, source: str, change: Any) -> torch.Tensor:
    sound = sendable(tensor, source)
    changed: torch.Tensor = sound if change is None else change(sound)
    return changed
