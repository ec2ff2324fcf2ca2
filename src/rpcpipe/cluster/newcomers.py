"""Ranks that come to a group that is complete, and wait until the main thread lets them join."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterable, Mapping
from typing import Any

from rpcpipe.cluster.authentication import version_complaint
from rpcpipe.cluster.control_channel import Channel
from rpcpipe.cluster.remote_worker import RemoteWorker

log = logging.getLogger("rpcpipe")


class Newcomers:
    """The ranks that wait, each under a name of its own, ``spare`` and a number from ``first`` on. For any thread."""

    def __init__(self, first: int) -> None:
        self._numbers = itertools.count(first)
        self._lock = threading.Lock()
        self._waiting: list[RemoteWorker] = []
        self._closed = False

    def come(self, hello: Mapping[str, Any], channel: Channel, members: Iterable[object]) -> RemoteWorker | None:
        """Let the rank that says ``hello`` wait, and return it to be watched; None for one that is sent away.

        Its rank must be nobody's among ``members``, the group's, whose agent lives.
        """
        who = f"rank {hello['rank']} ({hello['host']}:{hello['pid']})"
        with self._lock:
            others = [one for one in (*members, *self._waiting) if isinstance(one, RemoteWorker)]
            complaint = self._complaint(hello, who, others)
            member = None if complaint else RemoteWorker(f"spare{next(self._numbers)}", hello, channel)
            self._waiting += [] if member is None else [member]
        if member is not None:
            channel.send("wait")
            return member
        log.warning("%s came when the group was complete, and was sent away: %s", who, complaint)
        channel.send("abort", complaint)
        channel.close()
        return None

    def _complaint(self, hello: Mapping[str, Any], who: str, others: Iterable[RemoteWorker]) -> str | None:
        if self._closed:
            return f"the driver is closing; {who} is late"
        twin = next((one for one in others if one.rank == hello["rank"] and one.home_lives), None)
        if twin is not None:
            return (
                f"the group is complete and its rank {twin.rank} lives, on {twin.host}; {who} is late, or left from an"
                " earlier run. To add a worker start it with a RANK that nobody has; if that host has just died, try"
                " again in some seconds"
            )
        if hello["rank"] < 1:
            return f"{who}: RANK=0 is the driver's"
        return version_complaint(hello["versions"], who)

    def come_again(self, member: object) -> RemoteWorker | None:
        """Let the rank of ``member``, whose worker has ended, wait, and return it to be watched; None if it is gone."""
        if not isinstance(member, RemoteWorker) or not member.home_lives:
            return None
        with self._lock:
            again = member.renamed(f"spare{next(self._numbers)}")
            self._waiting.append(again)
        return again

    @property
    def waiting(self) -> int:
        """Return how many wait."""
        return len(self._waiting)

    def discard(self, member: object) -> bool:
        """Forget ``member``, which has ended; return whether it waited."""
        with self._lock:
            waited = member in self._waiting
            self._waiting = [one for one in self._waiting if one is not member]
        return waited

    def take(self) -> list[RemoteWorker]:
        """Return those that wait, who do so no longer."""
        with self._lock:
            taken, self._waiting = self._waiting, []
        return taken

    def close(self) -> None:
        """Send all away who wait, in peace, and everybody who still comes."""
        with self._lock:
            self._closed = True
        for member in self.take():
            member.dismiss()
