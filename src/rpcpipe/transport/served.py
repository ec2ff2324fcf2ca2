"""What a process serves: one endpoint at a time, to messages of those who have seats in one roster."""

from __future__ import annotations

from typing import Any

from rpcpipe.transport.base import Endpoint
from rpcpipe.transport.lane_calls import LaneCalls
from rpcpipe.transport.roster import Roster


class Served:
    """The endpoint that this process serves, and its calls that went by lanes.

    The transport's threads read either with its roster as a whole, so a message meets what is meant or nothing.
    """

    def __init__(self) -> None:
        self._served: tuple[Roster, Endpoint] | None = None
        self._calls: tuple[Roster, LaneCalls] | None = None

    def serve(self, endpoint: Endpoint, roster: Roster) -> None:
        """Run ``endpoint``'s verbs for the messages that ``roster`` accepts from now on, and no others."""
        self._served = roster, endpoint

    def expect(self, calls: LaneCalls, roster: Roster) -> None:
        """Let ``calls`` take the answers by RPC that ``roster`` accepts, and no others."""
        self._calls = roster, calls

    def stop(self) -> None:
        """Serve and expect nothing any more."""
        self._served = self._calls = None

    @property
    def served(self) -> tuple[Roster, Endpoint] | None:
        """Return the endpoint that is served, and to whom."""
        return self._served

    def dispatch(self, stamp: str, verb: str, args: tuple[Any, ...]) -> Any:
        """Run a message's verb and return its result; None where the message is of, or for, one who is no more."""
        served = self._served
        if served is None or not served[0].accepts(stamp):
            return None
        return getattr(served[1], verb)(*args)

    def run(self, roster: Roster, verb: str, args: tuple[Any, ...]) -> Any:
        """Run the verb of a message from one of ``roster``; return its result, or None if another one is served."""
        served = self._served
        return None if served is None or served[0] is not roster else getattr(served[1], verb)(*args)

    def answer(self, stamp: str, number: int, error: str, outcome: Any) -> None:
        """Complete a call that went by a lane; do nothing where the answer is of, or for, one who is no more."""
        calls = self._calls
        if calls is not None and calls[0].accepts(stamp):
            calls[1].complete(number, error, outcome)
