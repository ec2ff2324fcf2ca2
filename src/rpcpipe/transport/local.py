"""Run all workers in this process and one thread, in an order drawn from a seed.

Every message waits in a bag; each turn either delivers a random one or lets a random worker run
one ready task. So thousands of interleavings, more hostile than any network's, run in seconds and
each can be repeated. ``drop`` loses messages on purpose.
"""

from __future__ import annotations

import io
import pickle
import random
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from rpcpipe.errors import Failure, RpcPipeError, StageError, WorkerLost
from rpcpipe.transport.base import Endpoint
from rpcpipe.transport.message_pickling import MessagePickler
from rpcpipe.transport.replies import Replies


class LocalHandle:
    """Stands for a value that stays with its endpoint, as torch's RRef does."""

    def __init__(self, transport: LocalTransport, reply: Future[Any]) -> None:
        self.reply = reply
        self._transport = transport

    def to_here(self) -> Any:
        """Return a copy of the value, once it is there. Raises what torch's RRef does: RuntimeError for a Failure."""
        self._transport.wait([self.reply], float("inf"))
        if not self.reply.done():
            raise RpcPipeError("the value will never come: no message and no task is left")
        return _copied_with_graph(self.reply.result())


@dataclass(eq=False)
class _Message:
    """A message in the bag. ``args`` makes the copy that is delivered.

    ``keep``: the result stays with the endpoint. ``later``: if it is a future, its result is meant.
    ``handles``: the message waits until they have values.
    """

    to: str
    verb: str
    args: Callable[[], tuple[Any, ...]]
    reply: Future[Any]
    keep: bool = False
    later: bool = True
    handles: list[LocalHandle] = field(default_factory=list)

    @property
    def deliverable(self) -> bool:
        return all(handle.reply.done() for handle in self.handles)


class LocalTransport:
    """Carries messages between the endpoints of one process. ``endpoints`` holds them by name, for tests."""

    def __init__(self, seed: int = 0, *, drop: Callable[[str, str], bool] | None = None) -> None:
        self.endpoints: dict[str, Any] = {}
        self._random, self._near = random.Random(seed), random.Random(seed)
        self._bag: list[_Message] = []
        self._drop = drop or (lambda to, verb: False)
        self._replies = Replies()
        self._woken, self._left = threading.Event(), False
        self._contexts = 0
        self._gradients: dict[int, dict[torch.Tensor, torch.Tensor]] = {}

    def serve(self, name: str, endpoint: Endpoint) -> None:
        """Serve ``endpoint``, which needs no thread: its ``run_one()`` runs a task, or returns False."""
        self.endpoints[name] = endpoint

    def leave(self) -> None:
        self.endpoints.clear()
        self._left = True
        self.wake()

    def lose(self, worker: str, error: WorkerLost) -> None:
        self.endpoints.pop(worker, None)
        self._replies.lose(worker, error)

    def receive(self, timeout: float | None) -> bool:
        """Wait for ``wake`` alone: no message comes this way, as whoever waits for replies delivers all."""
        if self._left or not self._woken.wait(timeout):
            return False
        self._woken.clear()
        return True

    def wake(self) -> None:
        self._woken.set()

    def is_near(self, to: str) -> bool:
        """Return either for those that are served, in turn at random, so that tests see messages in both forms."""
        return to in self.endpoints and self._near.random() < 0.5

    def send(self, to: str, verb: str, *args: Any) -> None:
        self.call(to, verb, *args)

    def call(self, to: str, verb: str, *args: Any) -> Future[Any]:
        return self._post(_Message(to, verb, _packed(args), self._replies.open(to)))

    def remote(self, to: str, verb: str, *args: Any, later: bool = False) -> LocalHandle:
        reply = self._replies.open(to)
        return LocalHandle(self, self._post(_Message(to, verb, _packed(args), reply, keep=True, later=later)))

    def remote_chained(self, to: str, verb: str, *args: Any) -> LocalHandle:
        handles = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, LocalHandle)]
        reply = self._replies.open(to)
        own = _copied_with_graph(args)
        message = _Message(to, verb, lambda: _with_values(own), reply, keep=True, handles=handles)
        return LocalHandle(self, self._post(message))

    def _post(self, message: _Message) -> Future[Any]:
        if not message.reply.done() and not self._drop(message.to, message.verb):
            self._bag.append(message)
        return message.reply

    def wait(self, replies: Collection[Future[Any]], timeout: float) -> tuple[set[Future[Any]], set[Future[Any]]]:
        """Take turns until one of ``replies`` is done or nothing can happen any more; ``timeout`` does not count."""
        while not any(reply.done() for reply in replies) and self._turn():
            pass
        done = {reply for reply in replies if reply.done()}
        return done, set(replies) - done

    def _turn(self) -> bool:
        """Make one random delivery or run one task; return False if nothing can happen any more."""
        if self._bag and self._random.random() < 0.5 and self._deliver_one():
            return True
        workers = list(self.endpoints.values())
        self._random.shuffle(workers)
        return any(worker.run_one() for worker in workers) or self._deliver_one()

    def _deliver_one(self) -> bool:
        if not self._bag:
            return False
        index = self._random.randrange(len(self._bag))
        if not self._bag[index].deliverable:
            indices = [index for index, message in enumerate(self._bag) if message.deliverable]
            if not indices:
                return False
            index = self._random.choice(indices)
        self._deliver(self._bag.pop(index))
        return True

    def _deliver(self, message: _Message) -> None:
        if (endpoint := self.endpoints.get(message.to)) is None:
            return  # lost, or nobody serves any more: the message is dropped
        try:
            args = message.args()
        except Exception as error:
            self._replies.fail(message.to, message.reply, RuntimeError(f"{type(error).__name__}: {error}"))
            return
        result = getattr(endpoint, message.verb)(*args)
        if isinstance(result, Future) and message.later:
            result.add_done_callback(lambda done: self._answer(message, done.result()))
        else:
            self._answer(message, result)

    def _answer(self, message: _Message, result: Any) -> None:
        try:
            answer = result if message.keep else _packed(result)()
        except Exception as error:
            failed = RpcPipeError(f"the call to {message.to} failed: {error}")
            self._replies.fail(message.to, message.reply, failed)
        else:
            self._replies.complete(message.to, message.reply, answer)

    @contextmanager
    def context(self) -> Iterator[int]:
        self._contexts += 1
        context_id, self._gradients[self._contexts] = self._contexts, {}
        try:
            yield context_id
        finally:
            del self._gradients[context_id]

    def accumulate(self, context_id: int, root: torch.Tensor) -> None:
        """Backpropagate ``root``, a function of leaves, and add what they get to the context's gradients."""
        assert root.grad_fn is not None
        leaves = [getattr(node, "variable", None) for node, _ in root.grad_fn.next_functions]
        root.backward()  # type: ignore[no-untyped-call]
        gradients = self._gradients[context_id]
        for leaf in leaves:
            if leaf is not None and leaf.grad is not None:
                gradients[leaf] = gradients[leaf] + leaf.grad if leaf in gradients else leaf.grad
                leaf.grad = None

    def get_gradients(self, context_id: int) -> Mapping[torch.Tensor, torch.Tensor]:
        return self._gradients[context_id]


# --- copies: what a wire delivers shares no memory with what was sent ---

_IMMUTABLE = {str, bytes, int, float, bool, type(None)}


class _Pickler(MessagePickler):
    """Pickles all but tensors, which it collects."""

    def __init__(self, buffer: io.BytesIO) -> None:
        super().__init__(buffer, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: dict[int, torch.Tensor] = {}

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, torch.Tensor):
            return None
        self.tensors[id(value)] = value
        return id(value)


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, tensors: Mapping[int, torch.Tensor]) -> None:
        super().__init__(io.BytesIO(data))
        self._copies = {key: _detached(tensor) for key, tensor in tensors.items()}

    def persistent_load(self, key: int) -> torch.Tensor:
        return self._copies[key]


def _packed(value: Any) -> Callable[[], Any]:
    """Pickle ``value`` now; return a function that makes the copy.

    It copies tensors only then, as torch RPC may: a sender that modifies one too early is found out. Pickling
    is much faster than ``copy.deepcopy`` on tasks and reports.
    """
    if type(value) in _IMMUTABLE or (type(value) is tuple and all(type(part) in _IMMUTABLE for part in value)):
        return lambda: value
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(value)
    return lambda: _Unpickler(buffer.getvalue(), pickler.tensors).load()


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    copy = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(copy, tensor.requires_grad)
    return copy.requires_grad_(tensor.requires_grad)


def _copied_with_graph(value: Any) -> Any:
    """Return ``value``, a nest, with every tensor cloned such that gradients flow back through the clone.

    Raises RuntimeError for a Failure, as torch's RRef does.
    """
    if isinstance(value, Failure):
        raise RuntimeError(str(StageError(value)))
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, value)


def _with_values(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return ``args`` with every handle replaced by its value."""
    values: tuple[Any, ...] = pytree.tree_map(
        lambda leaf: _copied_with_graph(leaf.reply.result()) if isinstance(leaf, LocalHandle) else leaf, args
    )
    return values
