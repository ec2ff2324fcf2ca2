"""Schedules that do not flush while batches follow each other (Narayanan et al., "PipeDream", section 3.2).

A worker's next action depends on whether there is another micro-batch, so the order is extended as
micro-batches are fed. A drawn schedule is the same object, fed to its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count

from rpcpipe.schedules.action import Action


def pipedream(rank: int, workers: int, ends: Callable[[int], bool], first: int = 0) -> Iterator[Action]:
    """Yield 1F1B without end, from micro-batch ``first`` on: K - k forwards, then in turn a backward and a forward.

    An update follows the backward of a micro-batch that ``ends`` a group.
    """
    warmup = workers - rank
    for chunk in range(first, first + warmup):
        yield Action("F", rank, chunk)
    for chunk in count(first):
        yield Action("B", rank, chunk)
        if ends(chunk):
            yield Action("U", rank, chunk)
        yield Action("F", rank, chunk + warmup)


class StreamOrder:
    """The actions of every worker, as far as the micro-batches fed so far, from ``first`` on, determine them."""

    def __init__(self, workers: int, first: int = 0) -> None:
        self.fed = self._first = first
        self._ends: set[int] = set()
        self._rows = [pipedream(rank, workers, self._ends.__contains__, first) for rank in range(workers)]

    def feed(self, *, last: bool) -> list[tuple[int, Action]]:
        """Return the (worker, action) pairs that one more micro-batch adds; ``last``: an update follows its backward.

        The pairs are in an order in which all could run one by one.
        """
        chunk, self.fed = self.fed, self.fed + 1
        if last:
            self._ends.add(chunk)
        added = []
        for worker, row in enumerate(self._rows):
            for action in row:
                added.append((worker, action))
                if action == Action("F", worker, chunk):
                    break
        return added

    def drain(self) -> list[tuple[int, Action]]:
        """Return the (worker, action) pairs left when no micro-batch follows.

        The last micro-batch fed must have ended a group.
        """
        left = []
        for worker, row in reversed(list(enumerate(self._rows))):
            if self.fed > self._first:
                left += [(worker, action) for action in _until(row, Action("U", worker, self.fed - 1), self.fed)]
        return left


def _until(row: Iterator[Action], end: Action, chunks: int) -> Iterator[Action]:
    """Yield the actions of ``row`` on the first ``chunks`` micro-batches, up to and with ``end``."""
    for action in row:
        if action.chunk < chunks:
            yield action
        if action == end:
            return


def rows(workers: int, sizes: Sequence[int], *, every: bool) -> list[Iterable[Action]]:
    """Return each worker's actions for batches of ``sizes`` micro-batches, from an empty pipeline to an empty one.

    ``every``: an update follows each micro-batch, not each batch.
    """
    stream = StreamOrder(workers)
    done: list[list[Action]] = [[] for _ in range(workers)]
    for size in sizes:
        for chunk in range(size):
            for worker, action in stream.feed(last=every or chunk == size - 1):
                done[worker].append(action)
    for worker, action in stream.drain():
        done[worker].append(action)
    return list(done)
