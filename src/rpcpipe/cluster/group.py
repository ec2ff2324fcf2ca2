"""Workers that can be spoken to, before they form a cluster and while they do."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rpcpipe.cluster.join_listener import Door
from rpcpipe.cluster.monitor import Watch
from rpcpipe.cluster.process import Reader
from rpcpipe.cluster.worker_logs import Logs
from rpcpipe.transport import rpc

log = logging.getLogger("rpcpipe")


class Member(Protocol):
    """A worker as its driver sees it: a WorkerProcess here, or a RemoteWorker."""

    name: str
    host: str

    @property
    def pid(self) -> int: ...

    def send(self, kind: str, payload: Any = None) -> None: ...

    def sources(self) -> Mapping[int, Reader]: ...

    def state(self) -> str: ...

    def stopped(self) -> bool: ...

    def kill(self) -> None: ...

    def close(self) -> None: ...


def place_of(member: Member) -> str:
    """Name and place, as messages give them."""
    return f"{member.name} ({member.host}:{member.pid})"


@dataclass(eq=False)
class Group:
    """The members by name, and where they are heard.

    ``generation`` marks every message between them, ``numbers`` are torch RPC's names for them.
    """

    watch: Watch
    logs: Logs
    timeout: float
    names: Sequence[str]
    members: dict[str, Member] = field(default_factory=dict)
    door: Door | None = None
    generation: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        self.numbers = rpc.fresh_numbers(self.names)

    def config(self, name: str, device: str) -> dict[str, Any]:
        """What every worker is told, wherever it is."""
        return {
            "name": name,
            "numbers": self.numbers,
            "device": device,
            "timeout": self.timeout,
            "generation": self.generation,
            "log_level": logging.getLogger().getEffectiveLevel(),
        }

    def heard(self, source: Any, kind: str, payload: Any) -> bool:
        """What is done with a message at any time; False if it means something else."""
        if kind == "log":
            stream, line = payload
            self.logs.feed(source.name, stream, line, time.monotonic())
        elif kind == "hello":
            self._turn_away(*payload)
        else:
            return False
        return True

    def _turn_away(self, hello: Mapping[str, Any], channel: Any) -> None:
        who = f"rank {hello['rank']} ({hello['host']}:{hello['pid']})"
        log.warning("%s came when the group was complete, and was sent away", who)
        channel.send("abort", f"the group is complete; {who} is late, or left from an earlier run")
        channel.close()

    def rest(self) -> None:
        """Regular work of whoever polls the watch."""
        self.logs.flush(time.monotonic())
        if self.door is not None:
            self.door.sweep()

    def close(self) -> None:
        """Let go of everything; the members are dead, dying, or told to die."""
        if self.door is not None:
            self.door.close()
        for member in self.members.values():
            self.watch.forget(member)
            member.close()
        self.watch.close()
        self.logs.close()

    def abandon(self, reason: str) -> None:
        """Take apart a group that did not form."""
        for member in self.members.values():
            member.send("abort", reason)
            member.kill()
        self.close()


def name_of(rank: int) -> str:
    """The worker's name; rank 0 is the driver."""
    return f"worker{rank - 1}"


def names_of(workers: int) -> list[str]:
    """The names of that many workers, by rank from 1."""
    return [name_of(rank) for rank in range(1, workers + 1)]
