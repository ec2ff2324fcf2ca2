"""Represent, on the driver, a worker of another host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rpcpipe.cluster.control_channel import Channel, Message
from rpcpipe.cluster.process import Reader


class RemoteWorker:
    """A rank's worker, with the methods of a WorkerProcess, over the connection to the rank's host agent."""

    def __init__(self, name: str, hello: Mapping[str, Any], channel: Channel) -> None:
        self.name = name
        self.rank: int = hello["rank"]
        self.host: str = hello["host"]
        self.pid: int = hello["pid"]  # the agent's, until it says which process is the worker
        self.gpus: int = hello["gpus"]
        self.channel = channel

    def send(self, kind: str, payload: Any = None) -> None:
        """Send a message to the worker, which its agent passes on."""
        self.channel.send(kind, payload)

    def readers(self) -> Mapping[int, Reader]:
        """Return what to watch: the connection."""
        return {self.channel.fileno(): self._read}

    def _read(self) -> list[Message] | None:
        try:
            messages = self.channel.receive()
        except (EOFError, ValueError) as error:
            return [("died", f"closed its connection ({error or 'its rpcpipe.worker process or its host ended'})")]
        for kind, payload in messages:
            if kind == "spawned":
                self.pid = payload
        return messages

    def state(self) -> str:
        """Describe why the worker may not answer."""
        return "the host or the network may be down, or the worker is stopped or holds its GIL"

    def stopped(self) -> bool:
        """Return False: whether the process is stopped cannot be seen from here."""
        return False

    def kill(self) -> None:
        """Have the agent kill the worker."""
        self.channel.send("kill")

    def close(self) -> None:
        """Close the connection, upon which the agent ends."""
        self.channel.close()
