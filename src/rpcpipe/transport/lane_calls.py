"""Calls and answers by lanes: what a driver asks often, without an agent's threads on the way.

A call carries a number, which no other call of the group has, and its sender's wire name. The receiving thread runs the
verb; the answer, a message to that process if it still has a name, carries the number back. So no answer meets another
call, whoever has taken whose place meanwhile. What has tensors is left to RPC: they would stay in slots, which are
memory of the sender's, as long as the user keeps them.
"""

from __future__ import annotations

import io
import itertools
import pickle
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from rpcpipe.errors import RpcPipeError
from rpcpipe.transport.lanes import Lanes
from rpcpipe.transport.message_pickling import TensorsAside
from rpcpipe.transport.replies import Replies
from rpcpipe.transport.roster import Roster

CALL, ANSWER = "call", "answer"

# Runs a verb and returns its result, or the future of it.
Serve = Callable[[str, tuple[Any, ...]], Any]


class _HasTensorsError(Exception):
    """The message is not for a lane."""


class _Pickler(TensorsAside):
    def aside(self, tensor: torch.Tensor) -> tuple[Any, tuple[Any, ...]]:
        raise _HasTensorsError


def _pickled(value: Any) -> bytes | None:
    """Return ``value``, pickled; None if it has tensors."""
    buffer = io.BytesIO()
    try:
        _Pickler(buffer).dump(value)
    except _HasTensorsError:
        return None
    return buffer.getvalue()


class LaneCalls:
    """Both ends of calls by lane. ``serve`` runs a verb here; ``answer_otherwise`` takes what no lane can."""

    def __init__(
        self,
        roster: Roster,
        lanes: Lanes,
        replies: Replies,
        serve: Serve,
        answer_otherwise: Callable[[str, int, str, Any], None],
    ) -> None:
        self._roster, self._lanes, self._replies = roster, lanes, replies
        self._serve, self._answer_otherwise = serve, answer_otherwise
        self._numbers = itertools.count(roster.own.number << 32)
        self._pending: dict[int, tuple[str, Future[Any]]] = {}

    def call(self, to: str, reply: Future[Any], verb: str, args: tuple[Any, ...]) -> bool:
        """Send a call whose answer completes ``reply``; return False if no lane can take it."""
        lanes = self._lanes
        if not (lanes.listening and lanes.reach(to)) or (payload := _pickled((verb, args))) is None:
            return False
        number = next(self._numbers)
        self._pending[number] = to, reply
        if lanes.send(to, CALL, (self._roster.own.wire, number, payload, [])):
            return True
        self._pending.pop(number, None)  # `lose` may have been quicker
        return False

    def run(self, verb: str, args: tuple[Any, ...]) -> bool:
        """Run a message if it is a call or an answer; return whether it was."""
        if verb == CALL:
            self._run_call(*args)
        elif verb == ANSWER:
            self._take_answer(*args)
        else:
            return False
        return True

    def complete(self, number: int, error: str, outcome: Any) -> None:
        """End the call ``number`` with ``outcome`` or, unless it is "", with ``error``; not if its worker is lost."""
        if (pending := self._pending.pop(number, None)) is None:
            return
        if error:
            self._replies.fail(*pending, RpcPipeError(f"the call to {pending[0]} failed: {error}"))
        else:
            self._replies.complete(*pending, outcome)

    def lose(self, worker: str) -> None:
        """Forget the calls to ``worker``, whose replies fail."""
        for number, (to, _) in list(self._pending.items()):
            if to == worker:
                self._pending.pop(number, None)

    def _run_call(self, asker: str, number: int, payload: bytes, _: list[torch.Tensor]) -> None:
        try:
            result = self._serve(*pickle.loads(payload))
        except Exception as raised:
            self._answer(asker, number, None, _said(raised))
            return
        if isinstance(result, Future):
            result.add_done_callback(lambda done: self._answer(asker, number, done.result()))
        else:
            self._answer(asker, number, result)

    def _answer(self, asker: str, number: int, outcome: Any, error: str = "") -> None:
        """Send the answer, unless ``asker`` has been replaced; runs on whatever thread knows it."""
        if (name := self._roster.name(asker)) is None:
            return
        try:
            payload = _pickled(outcome)
        except Exception as raised:
            payload, outcome, error = b"", None, _said(raised)
        if payload is None or not self._lanes.send(name, ANSWER, (number, error, payload, [])):
            self._answer_otherwise(name, number, error, outcome)

    def _take_answer(self, number: int, error: str, payload: bytes, _: list[torch.Tensor]) -> None:
        outcome = None
        if not error:
            try:
                outcome = pickle.loads(payload)
            except Exception as raised:
                error = _said(raised)
        self.complete(number, error, outcome)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
