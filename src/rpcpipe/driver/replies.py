"""Whether and how a worker has replied."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any


def is_done(reply: Future[Any]) -> bool:
    """Return whether the task has been executed; one whose worker was lost may not have been."""
    return reply.done() and reply.exception() is None


def outcome_of(reply: Future[Any]) -> Future[Any]:
    """Return a future of the result of ``reply``, or of its exception."""
    outcome: Future[Any] = Future()
    reply.add_done_callback(lambda done: outcome.set_result(done.exception() or done.result()))
    return outcome
