"""After a rollback: replicas whose optimizer is sharded send each other the weights that they have restored.

Of the weights that others own a worker has no copy. An update that is taken back may have spread new ones already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

from rpcpipe.driver.replies import is_done
from rpcpipe.worker.operations import ShareWeights, Task


class Sequences(Protocol):
    """The workers of a pipeline, to each of which tasks go in one sequence."""

    workers: list[str]

    def new_step(self) -> int: ...

    def places(self) -> dict[str, int]: ...

    def send(self, worker: str, step: int, task: Task) -> Future[Any]: ...

    def cancel(self, step: int, first: Mapping[str, int]) -> None: ...

    def ensure_again(self, worker: str) -> None: ...


class _Round(NamedTuple):
    step: int
    first: Mapping[str, int]
    replies: Sequence[Future[Any]]


class Sharing:
    """``gathers``: by worker, the tasks by which it receives the others' weights; {} where nothing is sharded."""

    def __init__(self) -> None:
        self.gathers: Mapping[str, list[Task]] = {}
        self._rounds: list[_Round] = []

    def begin(self, driver: Sequences) -> None:
        """Have all workers send what they own, in their sequences; nothing is awaited."""
        if self.gathers:
            step, first = driver.new_step(), driver.places()
            replies = [self._send(driver, worker, step) for worker in driver.workers]
            self._rounds = [*self._unfinished(), _Round(step, first, replies)]

    def _send(self, driver: Sequences, worker: str, step: int) -> Future[Any]:
        reply = driver.send(worker, step, Task(ShareWeights(step)))
        for task in self.gathers.get(worker, []):
            reply = driver.send(worker, step, task)
        return reply

    def _unfinished(self) -> list[_Round]:
        return [one for one in self._rounds if not all(map(is_done, one.replies))]

    def again(self, driver: Sequences) -> None:
        """Begin again, now that dead workers' successors are there, unless all had received everything.

        Whoever waits for a dead worker's weights does so in the oldest round that is not finished, whatever follows.
        """
        rounds, self._rounds = self._unfinished(), []
        if rounds:
            driver.cancel(rounds[-1].step, rounds[0].first)
            for worker in driver.workers:
                driver.ensure_again(worker)
            self.begin(driver)

    def end(self) -> None:
        """Note that the state of all workers has been replaced, and nothing is under way."""
        self._rounds = []
