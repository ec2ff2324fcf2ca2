"""Say which process stands for which name in a group, also after one has taken a dead one's place.

A process keeps for its life the wire name and number that torch RPC and lanes know it by; no other process ever gets
them. Names such as "worker1" are seats that one process after the other may take.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from typing import NamedTuple

from rpcpipe.errors import StateError
from rpcpipe.transport.base import DRIVER
from rpcpipe.transport.owner import Owner

_MAX_NUMBER = (1 << 15) - 1  # torch numbers workers in 16 bits


class Seat(NamedTuple):
    """A process as torch RPC knows it."""

    wire: str
    number: int


# Between sender and receiver in the address of a lane's sending end.
_TO = ">"
DRIVERS_SEAT = Seat(DRIVER, 0)


class Seats:
    """Gives every worker of this process's groups another seat; torch's agent outlives a group."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)

    def give(self, name: str) -> Seat:
        """Return a seat that no process has had. Raises StateError once torch's 16 bits are used up."""
        if (number := next(self._numbers)) > _MAX_NUMBER:
            raise StateError(f"this process has launched {_MAX_NUMBER} workers, all that torch numbers: use another")
        return Seat(f"{name}-{number}", number)


seats = Seats()


def _address(generation: str, end: str) -> str:
    return f"\0rpcpipe-{generation}-{end}"


def sender_of(address: str | bytes) -> str:
    """Return the wire name of the process that has bound its end of a lane to ``address``; '' for a stranger."""
    end = address.decode("ascii", "replace").partition(_TO)[0] if isinstance(address, bytes) else ""
    return end.split("-", 2)[-1]


class Roster:
    """The seats of a group by name, as one of its processes knows them.

    ``generation`` is the group's random string. A message carries a stamp made of it, the sender's and the receiver's
    wire names: what a process that is dead had sent, or what was meant for it, is told by it and dropped. One thread
    changes a roster; others read it meanwhile, hence values are replaced as a whole.
    """

    def __init__(self, generation: str, name: str, seats: Mapping[str, Seat]) -> None:
        self._owner = Owner()
        self.generation = generation
        self.own = seats[name]
        self._ends = itertools.count()
        self.seats: Mapping[str, Seat] = {}
        self._stamps: Mapping[str, str] = {}
        self._accepted: frozenset[str] = frozenset()
        self._names: Mapping[str, str] = {}  # by wire name, of those that have a process
        self._without: frozenset[str] = frozenset()
        self.seat(seats)

    def seat(self, changes: Mapping[str, Seat], without: Collection[str] = ()) -> list[Seat]:
        """Let processes stand for names from now on, none for those ``without``; return the seats of the dead.

        A name without a process keeps its last one's seat: a message to it fails, as one to the dead does.
        """
        taken = changes.values()
        kept = {name: seat for name, seat in self.seats.items() if seat not in taken}
        seats = {**kept, **changes}
        self._without = (self._without | {*without}) - changes.keys()
        wires = {name: seat.wire for name, seat in seats.items()}
        self._names = {wire: name for name, wire in wires.items() if name not in self._without}
        self._accepted = frozenset(self._stamp(wire, self.own.wire) for wire in self._names)
        self._stamps = {name: self._stamp(self.own.wire, wire) for name, wire in wires.items()}
        dead = [seat for seat in self.seats.values() if seat.wire not in self._names]
        self.seats = seats
        return dead

    def _stamp(self, sender: str, receiver: str) -> str:
        return f"{self.generation} {sender} {receiver}"

    def stamp(self, to: str) -> str:
        """Return what this process writes on messages to ``to``; raises StateError in a fork of it."""
        self._owner.check()
        return self._stamps[to]

    def accepts(self, stamp: str) -> bool:
        """Return whether a message with ``stamp`` is for this process, and from one that has a seat."""
        return stamp in self._accepted

    @property
    def address(self) -> str:
        """Return the abstract socket address at which this process takes lanes."""
        return _address(self.generation, self.own.wire)

    def lane(self, to: str) -> tuple[str, str] | None:
        """Return the addresses of this process's end of a lane and of the end at ``to``; None for a stranger."""
        if (seat := self.seats.get(to)) is None:
            return None
        # The end that sends has a number of its own: the kernel may still have the address of an earlier one.
        sending = f"{self.own.wire}{_TO}{seat.wire}-{next(self._ends)}"
        return _address(self.generation, sending), _address(self.generation, seat.wire)

    def knows(self, wire: str) -> bool:
        """Return whether the process ``wire`` has a seat."""
        return wire in self._names

    def name(self, wire: str) -> str | None:
        """Return the name that the process ``wire`` has now; None if it has none."""
        return self._names.get(wire)
