"""Know which processes of a group live, how the others were lost, and what has happened to them so far."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from rpcpipe.cluster.rendezvous import Member, Worker
from rpcpipe.errors import WorkerLost


@dataclass(frozen=True)
class ClusterEvent:
    """What happened to a worker's process, and when (seconds since the epoch).

    ``kind``: "died"; "silent" (no sign of life, or no connection taken); "removed" (on request); "replaced" and "spare
    used", "stands in" (a process of the driver's host in the place of a rank's), where host and pid are the
    successor's, ``how`` says what became of its predecessor and ``seconds`` how long the replacement took; "joined" (a
    rank has come to the live cluster, as a spare); "added".
    """

    kind: str
    worker: str
    host: str
    pid: int
    how: str
    seconds: float | None = None
    time: float = field(default_factory=time.time)


@dataclass(frozen=True)
class WorkerStatus:
    """What a worker or spare holds, and did at its last sign of life.

    ``doing``: what its compute thread ran or waited for, "" before the first sign; ``finished``: its tasks done;
    ``memory``: its process's resident bytes, 0 if unknown; ``heard``: when the sign came (seconds since the epoch), or
    None.
    """

    worker: Worker
    stages: tuple[int, ...]
    doing: str
    finished: int
    memory: int
    lost: bool
    spare: bool
    heard: float | None


class Liveness:
    """Who lives. Any thread may call any method.

    A name is lost from the death or the silence of its process until ``restore``: a successor has joined.
    """

    def __init__(self, members: Iterable[Member]) -> None:
        self._changed = threading.Condition()
        self._alive = set(members)
        self._lost: dict[str, tuple[Member, WorkerLost]] = {}

    def start(self, member: Member) -> None:
        """Note a new process, which does not have its name yet."""
        with self._changed:
            self._alive.add(member)

    def end(self, member: Member) -> None:
        """Note that a process has ended."""
        with self._changed:
            self._alive.discard(member)
            self._changed.notify_all()

    def end_all(self) -> None:
        """Forget all processes: nobody waits for them any more."""
        with self._changed:
            self._alive.clear()
            self._changed.notify_all()

    def lose(self, member: Member, error: WorkerLost) -> None:
        """Note that ``member``'s name is lost, by its latest process."""
        with self._changed:
            self._lost[member.name] = member, error

    def restore(self, member: Member) -> bool:
        """Give ``member``, who has joined, its name; return False if it has been lost meanwhile."""
        with self._changed:
            if not self.serves(member):
                return False
            self._lost.pop(member.name, None)
            return True

    def forget(self, name: str) -> None:
        """Forget the loss of ``name``, which nobody is to have any more."""
        with self._changed:
            self._lost.pop(name, None)

    def is_lost(self, member: Member) -> bool:
        """Return whether the loss of this process has been noted."""
        found = self._lost.get(member.name)
        return found is not None and found[0] is member

    def is_alive(self, member: Member) -> bool:
        """Return whether the process has not ended."""
        return member in self._alive

    def serves(self, member: Member) -> bool:
        """Return whether the process has not ended and is not lost, as one that hangs is."""
        return self.is_alive(member) and not self.is_lost(member)

    @property
    def anybody(self) -> bool:
        """Return whether any process has not ended."""
        return bool(self._alive)

    @property
    def lost(self) -> dict[str, WorkerLost]:
        """Return how the processes of the names that are lost were."""
        with self._changed:
            return {name: error for name, (_, error) in self._lost.items()}

    def wait_for_ends(self, members: Collection[Member], timeout: float) -> bool:
        """Wait up to ``timeout`` seconds until ``members`` have ended; return whether they have."""
        with self._changed:
            return self._changed.wait_for(lambda: self._alive.isdisjoint(members), timeout)
