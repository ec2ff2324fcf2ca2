"""An endpoint that keeps what it gets, and those who ask it."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

import torch
from torch.distributed import autograd as dist_autograd
from torch.utils._pytree import tree_flatten, tree_leaves

from rpcpipe.errors import Failure
from rpcpipe.transport import Transport
from rpcpipe.transport.rpc import this_process

WORKER = "worker0"


class Recorder:
    """An endpoint that keeps what it gets."""

    def __init__(self) -> None:
        self.notes: list[Any] = []
        self.in_main_thread: set[bool] = set()  # whether verbs that may come by a lane ran there
        self.waiting: list[tuple[Future[Any], Any]] = []

    def clock(self) -> int:
        return 7

    def note(self, value: Any) -> Any:
        """Keep ``value`` and answer with it."""
        self.notes.append(value)
        return value

    def noted(self) -> list[Any]:
        return self.notes

    # The verbs whose messages may come by a lane. In a worker the main thread receives those, as the executor's.

    def deliver(self, *args: Any) -> None:
        self.in_main_thread.add(threading.current_thread() is threading.main_thread())
        self.notes.append(("deliver", *args))

    def deliver_tensors(self, *args: Any) -> None:
        self.in_main_thread.add(threading.current_thread() is threading.main_thread())
        self.notes.append(("deliver_tensors", *args))

    def supply(self, *args: Any) -> None:
        self.in_main_thread.add(threading.current_thread() is threading.main_thread())
        self.notes.append(("supply", *args))

    def submit(self, what: str, value: Any) -> Any:
        """Answer as the method ``what`` does. The calls that may come by a lane are of this verb."""
        self.in_main_thread.add(threading.current_thread() is threading.main_thread())
        return getattr(self, what)(value)

    def ran_in_main_thread(self) -> set[bool]:
        ran, self.in_main_thread = self.in_main_thread, set()
        return ran

    def spoil(self) -> None:
        """Modify every tensor that was kept."""
        for leaf in tree_leaves(self.notes):
            if isinstance(leaf, torch.Tensor):
                leaf.zero_()

    def later(self, value: Any) -> Future[Any]:
        """Answer with ``value`` once there is a ``release``."""
        future: Future[Any] = Future()
        self.waiting.append((future, value))
        return future

    def release(self) -> int:
        released, self.waiting = self.waiting, []
        for future, value in released:
            future.set_result(value)
        return len(released)

    def double(self, nest: dict[str, torch.Tensor]) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(2 * nest["x"])
        return future

    def knows(self, context_id: int) -> bool:
        """Answer whether this process knows a distributed-autograd context."""
        try:
            dist_autograd._is_valid_context(context_id)
        except RuntimeError:
            return False
        return True

    def make(self, what: str) -> Any:
        """Answer with something that is not easily sent."""
        return {"unpicklable": lambda: 1, "opens nowhere": OpensNowhere(), "long": "x" * 70_000}[what]

    def fail(self, nest: Any) -> Future[Any]:
        """Answer as an executor does whose user's code raised."""
        future: Future[Any] = Future()
        future.set_result(Failure.of(ValueError("größer"), worker=WORKER, action="forward"))
        return future

    def progress(self) -> tuple[int, str]:  # asked for by Cluster.close
        return 0, "idle"

    def run_one(self) -> bool:
        """There are no tasks here, which the in-process transport would run."""
        return False


class OpensNowhere:
    """Can be pickled, and not unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("no number",)


def serve_recorder() -> None:
    """Runs on the worker: serve a Recorder instead of the executor."""
    assert this_process.served is not None
    this_process.serve(Recorder(), this_process.served[0])


def result(transport: Transport, reply: Future[Any]) -> Any:
    done, waiting = transport.wait([reply], 5.0)
    assert (done, waiting) == ({reply}, set())
    return reply.result()


def ask(transport: Transport, verb: str, *args: Any) -> Any:
    return result(transport, transport.call(WORKER, verb, *args))


def equal(one: Any, other: Any) -> bool:
    """Whether two nests have equal leaves at the same places."""
    ones, others = tree_flatten(one), tree_flatten(other)
    return ones[1] == others[1] and all(
        torch.equal(a.to_dense(), b.to_dense()) and (a.dtype, a.layout) == (b.dtype, b.layout)
        if isinstance(a, torch.Tensor)
        else type(a) is type(b) and a == b
        for a, b in zip(ones[0], others[0], strict=True)
    )
