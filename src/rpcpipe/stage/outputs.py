"""What leaves a stage: every value is sound to send, and nobody writes to its memory while it is under way."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from rpcpipe.errors import ModelError
from rpcpipe.model.microbatch import Nest
from rpcpipe.model.sendable import checked
from rpcpipe.model.wiring import Flow

_ORDINARY = (torch.Tensor, nn.Parameter)
_KEPT = 64  # so many references are looked through before the dead ones are dropped


class Outputs:
    """Checks the outputs of a stage with ``layers``, by name.

    A value may be read as late as it arrives. What a layer returns of its own memory, a buffer or another attribute, is
    copied. Other memory that is returned again, written anew for the next micro-batch, has changed what was sent
    before: autograd's counter of in-place changes shows it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._last = list(module._modules)[-1]
        # Storages of the module, as they are at the first output.
        self._owned: set[int] | None = None
        # By storage: a reference that does not keep it alive, its counter of changes, and the micro-batch.
        self._sent: dict[int, tuple[StorageWeakRef, int, int]] = {}

    def forget(self) -> None:
        """Drop the record of what was sent: all of it has arrived."""
        self._sent.clear()

    def flow(self, flow: Flow, chunk: int) -> Flow:
        """Return the running value and the named values of micro-batch ``chunk`` as they are sent.

        Raises ModelError for what cannot be sent, and for memory that was sent before and has changed.
        """
        x, values = flow
        return self.value(x, chunk), {
            name: self._checked(v, chunk, f"the value {name!r}") for name, v in values.items()
        }

    def value(self, value: Nest, chunk: int) -> Nest:
        """Return the last layer's output as it is sent; raises as ``flow`` does."""
        return self._checked(value, chunk, f"the output of layer {self._last}")

    def _checked(self, nest: Nest, chunk: int, source: str) -> Nest:
        def to_host(tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor.cpu()
            if tensor.is_inference():  # has no counter
                return tensor.clone()
            return self._own(tensor, chunk, source) if tensor.layout is torch.strided else tensor

        return checked(nest, source, to_host)

    def _own(self, tensor: torch.Tensor, chunk: int, source: str) -> torch.Tensor:
        """Return ``tensor``, or a copy if it is in the module's memory; raises ModelError as ``flow`` does."""
        reference, version = StorageWeakRef(tensor.untyped_storage()), tensor._version  # type: ignore[no-untyped-call]
        if self._owned is None:
            self._owned = {int(owned.untyped_storage()._cdata) for owned in _tensors_of(self._module)}
        if reference.cdata in self._owned:
            return tensor.clone()
        before = self._sent.get(reference.cdata)
        # While the reference is held, no other storage has the same address.
        if before is not None and before[1] != version:
            raise ModelError(
                f"{source} is in memory that also held that of micro-batch {before[2]}, which may still be under way,"
                " and was changed in place since; return a copy, .clone()"
            )
        if len(self._sent) >= _KEPT:
            self._sent = {key: kept for key, kept in self._sent.items() if not kept[0].expired()}  # type: ignore[no-untyped-call]
        self._sent[reference.cdata] = reference, version, chunk
        return tensor


def _tensors_of(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yield what ``module`` and its parts hold: parameters, buffers, other attributes, lists and dicts of tensors."""
    for part in module.modules():
        for value in vars(part).values():  # parameters and buffers are in dicts among them
            items = value.values() if isinstance(value, dict) else value
            inner = items if isinstance(value, (dict, list, tuple)) else (value,)
            yield from (item for item in inner if type(item) in _ORDINARY and item.layout is torch.strided)
