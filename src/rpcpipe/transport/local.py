"""All workers in this process and one thread, in an order drawn from a seed.

Every message waits in a bag; each turn either delivers a random one or lets a random worker run
one ready task. So thousands of interleavings, more hostile than any network's, run in seconds and
each can be repeated. ``drop`` loses messages on purpose.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import torch

Message = tuple[str, str, tuple[Any, ...], Future[Any]]


class LocalTransport:
    """Carries messages between ``endpoints``, which the caller fills in by name."""

    def __init__(self, seed: int = 0, *, drop: Callable[[str, str], bool] | None = None) -> None:
        self.endpoints: dict[str, Any] = {}
        self._random = random.Random(seed)
        self._bag: list[Message] = []
        self._drop = drop or (lambda to, verb: False)
        self._contexts = 0

    def tell(self, to: str, verb: str, *args: Any) -> None:
        # What a wire delivers shares no memory with what was sent, and with what others get.
        self.post(to, verb, *copy.deepcopy(args))

    def post(self, to: str, verb: str, *args: Any) -> Future[Any]:
        reply: Future[Any] = Future()
        if not self._drop(to, verb):
            self._bag.append((to, verb, args, reply))
        return reply

    def hold(self, to: str, verb: str, *args: Any, later: bool = False) -> object:
        return self.post(to, verb, *args)

    def chain(self, to: str, verb: str, *args: Any) -> object:
        return self.hold(to, verb, *args)

    def wait(self, replies: Collection[Future[Any]], timeout: float) -> tuple[set[Future[Any]], set[Future[Any]]]:
        while not any(reply.done() for reply in replies) and self._turn():
            pass
        done = {reply for reply in replies if reply.done()}
        return done, set(replies) - done

    def _turn(self) -> bool:
        """One random delivery or task; False if nothing can happen any more."""
        workers = list(self.endpoints.values())
        if self._bag and self._random.random() < 0.5:
            self._deliver(self._bag.pop(self._random.randrange(len(self._bag))))
            return True
        self._random.shuffle(workers)
        if any(worker.run_one() for worker in workers):
            return True
        if self._bag:
            self._deliver(self._bag.pop(self._random.randrange(len(self._bag))))
            return True
        return False

    def _deliver(self, message: Message) -> None:
        to, verb, args, reply = message
        result = getattr(self.endpoints[to], verb)(*args)
        if isinstance(result, Future):
            result.add_done_callback(lambda done: reply.set_result(done.result()))
        else:
            reply.set_result(result)

    @contextmanager
    def context(self) -> Iterator[int]:
        self._contexts += 1
        yield self._contexts

    def file(self, context_id: int, root: torch.Tensor) -> None:
        root.backward()  # type: ignore[no-untyped-call]

    def collect(self, context_id: int) -> Mapping[torch.Tensor, torch.Tensor]:
        return _LeafGradients()


class _LeafGradients(dict[torch.Tensor, torch.Tensor]):
    """Without distributed autograd the gradients lie in ``.grad``."""

    def get(self, parameter: torch.Tensor, default: Any = None) -> Any:
        return parameter.grad
