"""From a group's members to a cluster whose workers can call each other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rpcpipe.cluster.group import Group, Member, place_of
from rpcpipe.errors import RendezvousError
from rpcpipe.transport import rpc
from rpcpipe.transport.rpc_store import ExchangeStore

_STOPPED_SECONDS = 1.5


def form(group: Group, interface: str) -> None:
    """Bring the group together; raises RendezvousError, naming who did not come and its last words.

    Whatever it raises, KeyboardInterrupt included, the group is taken apart then.
    """
    try:
        _Formation(group).run(interface)
    except BaseException as error:
        group.abandon(f"{type(error).__name__}: {error}")
        rpc.leave()
        raise


class _Formation:
    """The main thread's work while a group forms: hear everybody, pass on addresses, notice deaths."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._members: list[Member] = list(group.members.values())
        self._until = time.monotonic() + group.timeout
        self._values: dict[str, str] = {}
        self._said: dict[str, set[str]] = {"ready": set(), "joined": set()}
        self._stopped: dict[str, float] = {}

    def run(self, interface: str) -> None:
        self._until_all("ready")
        for member in self._members:
            member.send("join")
        store = ExchangeStore(self._publish, self._fetch)
        rpc.join(store, rpc.DRIVER, self._group.numbers, self._group.generation, interface=interface)
        self._until_all("joined")

    def _publish(self, key: str, value: str) -> None:
        self._values[key] = value
        for member in self._members:
            member.send("key", [key, value])

    def _fetch(self, key: str) -> str:
        while key not in self._values:
            self._pump(f"publish {key!r}", self._members)
        return self._values[key]

    def _until_all(self, word: str) -> None:
        while missing := [member for member in self._members if member.name not in self._said[word]]:
            self._pump(f"report {word!r}", missing)

    def _pump(self, what: str, missing: Sequence[Member]) -> None:
        """Handle what happens next; raises when it is too late for ``missing`` to do ``what``."""
        now = time.monotonic()
        if now > self._until:
            raise RendezvousError(
                f"{', '.join(map(place_of, missing))} did not {what} within {self._group.timeout:g} s: the host may be"
                " overloaded, or the network between the hosts closed; pass a larger timeout, or see `rpcpipe doctor`"
            )
        for source, kind, payload in self._group.watch.poll(self._until - now):
            if not self._group.heard(source, kind, payload):
                self._hear(source, kind, payload)
        for member in missing:
            self._check_stopped(member, now)
        self._group.rest()

    def _hear(self, source: Any, kind: str, payload: Any) -> None:
        if kind == "set":
            self._publish(*payload)
        elif kind in self._said:
            self._said[kind].add(source.name)
        elif kind in ("died", "silent"):
            how = payload if kind == "died" else f"fell silent ({source.state()})"
            last = self._group.logs.tail(source.name)
            words = f". Its last lines:\n{last}" if last else " without a word"
            raise RendezvousError(f"{place_of(source)} {how} while starting{words}")

    def _check_stopped(self, member: Member, now: float) -> None:
        """A worker that does not beat yet may be stopped all the same."""
        if not member.stopped():
            self._stopped.pop(member.name, None)
        elif now - self._stopped.setdefault(member.name, now) > _STOPPED_SECONDS:
            raise RendezvousError(f"{place_of(member)} does not start: {member.state()}")
