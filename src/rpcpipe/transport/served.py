"""What a process serves: one endpoint at a time, to messages of one generation."""

from __future__ import annotations

from typing import Any

from rpcpipe.transport.base import Endpoint
from rpcpipe.transport.lane_calls import LaneCalls


class Served:
    """The endpoint that this process serves, and its calls that went by lanes.

    The transport's threads read either with its generation as a whole, so a message meets what is meant or nothing.
    """

    def __init__(self) -> None:
        self._served: tuple[str, Endpoint] | None = None  # generation, endpoint
        self._calls: tuple[str, LaneCalls] | None = None  # generation, calls that went by lanes

    def serve(self, endpoint: Endpoint, generation: str) -> None:
        """Run ``endpoint``'s verbs for the messages of ``generation`` from now on, and no others."""
        self._served = generation, endpoint

    def expect(self, calls: LaneCalls, generation: str) -> None:
        """Let ``calls`` take the answers of ``generation`` that come by RPC, and no others."""
        self._calls = generation, calls

    def stop(self) -> None:
        """Serve and expect nothing any more."""
        self._served = self._calls = None

    @property
    def endpoint(self) -> Endpoint | None:
        """Return the endpoint that is served."""
        return None if self._served is None else self._served[1]

    def dispatch(self, generation: str, verb: str, args: tuple[Any, ...]) -> Any:
        """Run a message's verb and return its result; None for a generation that is not served any more."""
        served = self._served
        if served is None or served[0] != generation:
            return None
        return getattr(served[1], verb)(*args)

    def answer(self, generation: str, number: int, error: str, outcome: Any) -> None:
        """Complete a call that went by a lane; do nothing for a generation that expects no answers."""
        calls = self._calls
        if calls is not None and calls[0] == generation:
            calls[1].complete(number, error, outcome)
