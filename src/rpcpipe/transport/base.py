"""Define the seam: what rpcpipe needs of whatever carries its messages.

Names are strings, ``DRIVER`` or a worker's; verbs are method names of the receiving ``Endpoint``. Messages
may arrive in any order. What is received shares no memory with what was sent; but a transport may read a
tensor as late as it delivers the message, so nobody may modify one that they have sent.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from rpcpipe.errors import WorkerLost

DRIVER = "driver"


class Endpoint(Protocol):
    """Receives messages: every method is a verb. None may block; a slow one returns a ``Future``.

    The transport's threads call verbs, several at once, and so does the thread that calls ``Transport.receive``.
    A verb reports an error by a ``Failure`` value; it does not raise.
    """

    def clock(self) -> int:
        """Return this process's monotonic clock in nanoseconds; the transport also probes with it."""
        ...


class WorkerEndpoint(Endpoint, Protocol):
    """The verbs that a worker serves. What they carry is in ``rpcpipe.worker.messages``."""

    def create(self, pipeline: str, spec: bytes) -> Future[Any]: ...

    def revive(self, pipeline: str, turn: int, path: str, place: int, copy: bool) -> Future[Any]: ...

    def drop(self, pipeline: str) -> None: ...

    def submit(
        self, pipeline: str, step: int, sequence: int, sent: Sequence[Any], values: Sequence[Any] = ()
    ) -> Future[Any]: ...

    def accept(
        self, pipeline: str, step: int, sequence: int, sent: Sequence[Any], values: Sequence[Any] = ()
    ) -> str: ...

    def deliver(self, pipeline: str, step: int, port: Any, value: Any) -> None: ...

    def deliver_tensors(
        self, pipeline: str, step: int, place: Any, wants_grad: list[bool] | None, tensors: list[torch.Tensor]
    ) -> None: ...

    def supply(self, pipeline: str, step: int, values: Sequence[Any]) -> None: ...

    def cancel(self, pipeline: str, step: int, first: int, resume: int) -> None: ...

    def abandon(self, pipeline: str, step: int, group: int) -> None: ...

    def watch(self, pipeline: str, step: int) -> Future[Any]: ...

    def store(self, pipeline: str, of: str, number: int, size: int, piece: tuple[int, torch.Tensor] | None) -> None: ...

    def stored(self, pipeline: str, of: str, number: int) -> Future[Any]: ...

    def send_snapshot(self, pipeline: str, of: str, number: int, path: str, to: str) -> None: ...

    def forget_snapshots(self, pipeline: str, number: int) -> None: ...

    def run(self, call: bytes) -> Future[Any]: ...

    def forward(self, pipeline: str, number: int, nest: Any) -> Future[Any]: ...

    def read(self, pipeline: str, order: Any) -> Future[Any]: ...

    def progress(self) -> tuple[int, str]: ...


class Transport(Protocol):
    """Sends messages to endpoints by name, and hands those for this process to the endpoint it serves."""

    def serve(self, name: str, endpoint: Endpoint) -> None:
        """Run ``endpoint``'s verbs for messages to ``name`` from now on; ``name`` is in this process."""
        ...

    def leave(self) -> None:
        """Stop serving; the others have ended. Messages that still arrive are dropped; ``receive`` returns at once."""
        ...

    def lose(self, worker: str, error: WorkerLost) -> None:
        """Fail the pending and all future calls to ``worker``, which is dead, with ``error``."""
        ...

    def send(self, to: str, verb: str, *args: Any) -> None:
        """Send without an answer."""
        ...

    def receive(self, timeout: float | None) -> bool:
        """Run what has come for the thread that receives; wait for it, or for ``wake``, up to ``timeout`` seconds.

        None waits until one of them or ``leave`` ends it. One thread of a process receives. Which messages are for it
        is the transport's choice, and may be none; other threads run all others. Returns whether there was anything,
        ``wake`` included.
        """
        ...

    def wake(self) -> None:
        """Let the ``receive`` under way return at once, or else the next one. Any thread may call it."""
        ...

    def is_near(self, to: str) -> bool:
        """Return whether ``send`` carries tensors to ``to`` at less cost than other calls do; not if ``to`` is lost."""
        ...

    def call(self, to: str, verb: str, *args: Any) -> Future[Any]:
        """Send; return the future of the result (of the result's result, if it is a future).

        The future raises WorkerLost if ``to`` is lost. Which calls the thread that receives runs is the transport's
        choice; in a worker those alone that may wait until it has ended its task.
        """
        ...

    def remote(self, to: str, verb: str, *args: Any, later: bool = False) -> object:
        """Send; keep the result at ``to`` until the returned handle (an RRef) is deleted.

        ``later``: the verb returns a future, whose result is kept instead. May raise WorkerLost at once;
        otherwise the loss of ``to`` is noticed where the handle is used.
        """
        ...

    def remote_chained(self, to: str, verb: str, *args: Any) -> object:
        """Send once the handles nested in ``args`` have values, which replace them; return a handle.

        The verb must return a future. Tensors stay in the autograd graph across the message.
        """
        ...

    def wait(self, replies: Collection[Future[Any]], timeout: float) -> tuple[set[Future[Any]], set[Future[Any]]]:
        """Wait up to ``timeout`` seconds for one of ``replies``; return (done, not done).

        Any thread, several at once. A reply may come only while some thread waits, for whichever replies.
        """
        ...

    def context(self) -> AbstractContextManager[int]:
        """Open a distributed-autograd context; a message sent inside by this thread makes it known there."""
        ...

    def accumulate(self, context_id: int, root: torch.Tensor) -> None:
        """Backpropagate ``root`` into the context."""
        ...

    def get_gradients(self, context_id: int) -> Mapping[torch.Tensor, torch.Tensor]:
        """Return the context's gradients by parameter."""
        ...
