"""Counts the most memory that tensors have at once while something runs, on any device, the meta device included."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside ``with PeakMemory(known) as memory:`` counts the storages that operations make, until they are gone.

    ``peak``: the most bytes at once. ``known``: tensors that do not count. What kernels use while they run is not seen.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak: int = 0
        self._now = 0
        self._live: dict[int, int] = {}
        for tensor in known:
            self._note(tensor, counts=False)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)):
            self._note(leaf, counts=False)  # made before, or by what no operation shows
        result = function(*args, **kwargs)
        for leaf in tree_leaves(result):
            self._note(leaf, counts=True)
        return result

    def _note(self, tensor: Any, *, counts: bool) -> None:
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        self._live[key] = size = storage.nbytes() if counts else 0
        weakref.finalize(storage, self._gone, key).atexit = False
        self._now += size
        self.peak = max(self.peak, self._now)

    def _gone(self, key: int) -> None:
        self._now -= self._live.pop(key, 0)
