"""Represent, on the driver, a worker of another host."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from concurrent.futures import Future
from typing import Any

from rpcpipe.cluster.control_channel import Channel, Message
from rpcpipe.cluster.process import Reader
from rpcpipe.errors import WorkerLost

_ANSWER_SECONDS = 5.0
_numbers = itertools.count()


class RemoteKept:
    """What a worker of another host keeps, open in its agent under ``number``. ``path``: what a successor opens."""

    def __init__(self, path: str, number: int, channel: Channel) -> None:
        self.path = path
        self._number, self._channel = number, channel

    @property
    def alive(self) -> bool:
        """Return whether the agent that holds it is still there."""
        return self._channel.open

    def close(self) -> None:
        """Let go of it."""
        self._channel.send("let go", self._number)


class RemoteWorker:
    """A rank's worker, with the methods of a WorkerProcess, over the connection to the rank's host agent."""

    def __init__(self, name: str, hello: Mapping[str, Any], channel: Channel) -> None:
        self.name = name
        self._hello = hello
        self.rank: int = hello["rank"]
        self.host: str = hello["host"]
        self.domain = f"{self.host}#{self.rank}"
        self.pid: int = hello["pid"]  # the agent's, until it says which process is the worker
        self.gpus: int = hello["gpus"]
        self.channel = channel
        self._is_waiting = True  # its agent has not been told yet to start a worker
        self._kept: dict[int, Future[str]] = {}

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
            self.channel.shut()
            for asked in self._kept.values():
                if not asked.done():
                    asked.set_result("")
            return [("died", f"closed its connection ({str(error) or 'its rpcpipe.worker process or its host ended'})")]
        for kind, payload in messages:
            if kind == "spawned":
                self.pid = payload
            elif kind == "kept" and payload[0] in self._kept:
                self._kept[payload[0]].set_result(payload[1])
        return messages

    def keep(self, pid: int, descriptor: int) -> RemoteKept:
        """Have the agent keep number ``descriptor`` of the worker ``pid`` open, whoever dies but the agent.

        Raises WorkerLost where the worker or the agent has ended.
        """
        number = next(_numbers)
        answer: Future[str] = Future()
        self._kept[number] = answer
        self.send("keep", [number, pid, descriptor])
        if not self.channel.open:
            answer.set_result("")
        try:
            path = answer.result(timeout=_ANSWER_SECONDS)
        except TimeoutError:
            path = ""
        del self._kept[number]
        if not path:
            raise WorkerLost(f"{self.host} does not keep what {self.name} ({pid}) has", worker=self.name, pid=pid)
        return RemoteKept(path, number, self.channel)

    @property
    def home_lives(self) -> bool:
        """Return whether the agent still has its connection, so that it could start another worker."""
        return self.channel.open

    def device(self, taken: Collection[str]) -> str:
        """Return one of the host's GPUs, not of those ``taken`` if there is another; "cpu" where there are none."""
        if not self.gpus:
            return "cpu"
        every = [f"cuda:{index}" for index in range(self.gpus)]
        return next((one for one in every if one not in taken), every[len(taken) % self.gpus])

    def start(self, config: Mapping[str, Any]) -> RemoteWorker:
        """Have the agent start a worker; return it: this one, or another one with its connection if it has ended."""
        if self._is_waiting:
            self._is_waiting = False
            self.send("config", dict(config))
            return self
        return self.renamed(self.name).start(config)

    def renamed(self, name: str) -> RemoteWorker:
        """Return the rank's next worker, which is to be started and to have another name; this one has ended."""
        return RemoteWorker(name, self._hello, self.channel)

    def fence(self) -> None:
        """Cut the connection of an agent that does not answer: from here on nobody hears its worker.

        The agent ends its worker and itself, when it hears of it or of no driver for some seconds.
        """
        self.channel.shut()

    def state(self) -> str:
        """Describe why the worker may not answer."""
        return "the host or the network may be down, or the worker is stopped or holds its GIL"

    def stopped(self) -> bool:
        """Return False: whether the process is stopped cannot be seen from here."""
        return False

    def kill(self) -> None:
        """Have the agent kill the worker."""
        self.channel.send("kill")

    def dismiss(self) -> None:
        """Let the agent end in peace: its worker has ended, or it never had one."""
        self.send("stop")
        self.close()

    def close(self) -> None:
        """Close the connection, upon which the agent ends."""
        self.channel.close()
