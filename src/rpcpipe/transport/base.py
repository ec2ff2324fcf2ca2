"""The seam between what rpcpipe decides and what carries it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch


class Transport(Protocol):
    """Messages may arrive in any order. ``post`` and ``hold`` run ``verb`` of ``to``'s endpoint."""

    def tell(self, to: str, verb: str, *args: Any) -> None:
        """Send and forget."""
        ...

    def post(self, to: str, verb: str, *args: Any) -> Future[Any]:
        """Send; the future gets the result, or WorkerLost."""
        ...

    def hold(self, to: str, verb: str, *args: Any, later: bool = False) -> object:
        """Send; the result stays there until the returned handle (an RRef) is let go.

        ``later``: the verb answers with a future, and its result is meant.
        """
        ...

    def chain(self, to: str, verb: str, *args: Any) -> object:
        """Like ``hold``; handles among ``args`` are replaced by their values, as part of the graph."""
        ...

    def wait(self, replies: Collection[Future[Any]], timeout: float) -> tuple[set[Future[Any]], set[Future[Any]]]:
        """Wait up to ``timeout`` seconds for one of ``replies``: (done, not done)."""
        ...

    def context(self) -> AbstractContextManager[int]:
        """A distributed-autograd context; what this thread sends inside makes it known there."""
        ...

    def file(self, context_id: int, root: torch.Tensor) -> None:
        """Backpropagate ``root`` into the context."""
        ...

    def collect(self, context_id: int) -> Mapping[torch.Tensor, torch.Tensor]:
        """The context's gradients by parameter."""
        ...
