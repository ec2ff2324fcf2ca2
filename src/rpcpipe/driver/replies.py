"""Whether and how a worker has replied."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any

from rpcpipe.errors import Failure, StageError, WorkerLost


def is_done(reply: Future[Any]) -> bool:
    """Return whether the tasks have been executed; a lost worker's may not have been; its successor refuses them."""
    return reply.done() and reply.exception() is None and not isinstance(reply.result(), Failure)


def outcome_of(reply: Future[Any]) -> Future[Any]:
    """Return a future of the result of ``reply``, or of its exception."""
    outcome: Future[Any] = Future()
    reply.add_done_callback(lambda done: outcome.set_result(done.exception() or done.result()))
    return outcome


def raise_failure(outcomes: Iterable[Any]) -> None:
    """Raise the first Failure among ``outcomes`` as StageError."""
    for outcome in outcomes:
        if isinstance(outcome, Failure):
            raise StageError.of(outcome)


def raise_loss(outcomes: Iterable[Any]) -> None:
    """Raise the first loss of a worker among ``outcomes``."""
    for outcome in outcomes:
        if isinstance(outcome, WorkerLost):
            raise outcome
