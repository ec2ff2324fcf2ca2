"""What autograd keeps of a forward pass: counted, or not kept at all."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Distinct memory behind ``tensors``: bytes by address."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in found}


class Meter:
    """Counts the distinct memory that autograd saves inside the with-block, but for what is in ``known``."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        self._known = storages(known).keys()
        self._saved: dict[int, int] = {}
        self._hooks: AbstractContextManager[None] = saved_tensors_hooks(self._pack, _same)

    @property
    def bytes(self) -> int:
        return sum(size for address, size in self._saved.items() if address not in self._known)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self._saved |= storages([tensor])
        # The tensor itself may be an output of the node that saves it: a cycle that is never freed.
        return tensor.detach()

    def __enter__(self) -> Meter:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)


def forgetting() -> AbstractContextManager[None]:
    """Inside, autograd builds its graph, which says what needs a gradient, and saves nothing.

    Unlike under ``no_grad`` every operation takes the path that it takes when it is recomputed.
    """
    return saved_tensors_hooks(_nothing, _gone)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _nothing(_: torch.Tensor) -> None:
    return None


def _gone(_: None) -> torch.Tensor:
    raise AssertionError("the graph of a forward whose activations were dropped has been used")
