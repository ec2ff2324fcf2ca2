"""What leaves a stage: every value is sound to send, and nobody writes to its memory while it is under way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from rpcpipe.model.microbatch import Nest
from rpcpipe.model.sendable import checked
from rpcpipe.model.wiring import Flow

_KEPT = 64  # so many references are looked through before the dead ones are dropped


class Outputs:
    """Checks the outputs of a stage with ``layers``, by name.

    A value may be read as late as it arrives. A layer that returns the same memory again, written anew for the next
    micro-batch, has changed what was sent before: autograd's counter of in-place changes shows it.
    """

    def __init__(self, layers: Sequence[str]) -> None:
        self._last = layers[-1] if layers else ""
        # By storage: a reference that does not keep it alive, its counter of changes, and the micro-batch.
        self._sent: dict[int, tuple[StorageWeakRef, int, int]] = {}

    def forget(self) -> None:
        """All that was sent has arrived."""
        self._sent.clear()

    def flow(self, flow: Flow, chunk: int) -> Flow:
        """Return the running value and the named values of micro-batch ``chunk`` as they are sent.

        Raises TypeError for what cannot be sent, and RuntimeError for memory that was sent before and has changed.
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
            if tensor.layout is torch.strided:
                self._note(tensor, chunk, source)
            return tensor

        return checked(nest, source, to_host)

    def _note(self, tensor: torch.Tensor, chunk: int, source: str) -> None:
        reference, version = StorageWeakRef(tensor.untyped_storage()), tensor._version  # type: ignore[no-untyped-call]
        before = self._sent.get(reference.cdata)
        # While the reference is held, no other storage has the same address.
        if before is not None and before[1] != version:
            raise RuntimeError(
                f"{source} is in memory that also held that of micro-batch {before[2]}, which is still being sent, and"
                " was changed in place since; return a copy, .clone()"
            )
        if len(self._sent) >= _KEPT:
            self._sent = {key: kept for key, kept in self._sent.items() if not kept[0].expired()}  # type: ignore[no-untyped-call]
        self._sent[reference.cdata] = reference, version, chunk
