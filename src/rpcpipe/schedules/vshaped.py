"""Schedules that hold two stages per worker, laid out in a V: worker k has stages k and 2K - 1 - k.

The last stage is on the worker of the first, so the loss's gradient starts back without a transfer.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Set

from rpcpipe.schedules.action import Action
from rpcpipe.schedules.order import Order


def v_placement(workers: int) -> tuple[int, ...]:
    """Return the worker of every stage: 0 … K - 1 down the workers, K … 2K - 1 back up."""
    return (*range(workers), *reversed(range(workers)))


def zb_v(workers: int, chunks: int) -> list[list[Action]]:
    """Return each worker's row of zero bubble in a V (Qi et al., "Zero Bubble", section 6, ZB-V).

    Forwards and input gradients are in the paper's order. A weight gradient takes every unit of time
    (F = I = W) in which the next of those cannot start: what it waits for is not done, or as many activations
    are alive as in the paper, min(2K, 2M, M + k + 1) on worker k. At M ≥ 2K - 1 the makespan is
    M(F + B) + (K - 1)F/2, where F and B are those of a worker's two stages together.
    """
    given = tuple(tuple(_forwards_and_input_gradients(rank, workers, chunks)) for rank in range(workers))
    order = Order("zb-v", chunks, v_placement(workers), given)
    limits = [min(2 * workers, 2 * chunks, chunks + rank + 1) for rank in range(workers)]
    writers = [_Filled(order, rank, limit) for rank, limit in enumerate(limits)]
    done: set[Action] = set()
    while chosen := [action for writer in writers if (action := writer.next(done))]:
        done.update(chosen)
    return [writer.row for writer in writers]


def _forwards_and_input_gradients(rank: int, workers: int, chunks: int) -> Iterator[Action]:
    """Yield them in the order for at least 2K - 1 micro-batches, without those that do not exist."""
    full, ahead = max(chunks, 2 * workers - 1), workers - rank
    out, back = rank, 2 * workers - 1 - rank
    forward_out, forward_back = Action("F", out, 0), Action("F", back, 0)
    gradient_out, gradient_back = Action("I", out, 0), Action("I", back, 0)
    phases: list[tuple[int, list[Action]]] = [
        (2 * ahead - 1, [forward_out]),
        (rank, [forward_back, forward_out]),
        (ahead, [forward_back, gradient_back]),
        (full - workers - ahead + 1, [forward_out, gradient_out, forward_back, gradient_back]),
        (ahead - 1, [gradient_out, forward_back, gradient_back]),
        (rank, [gradient_out, gradient_back]),
        (ahead, [gradient_out]),
    ]
    counts: Counter[Action] = Counter()
    for times, steps in phases:
        for step in steps * times:
            if counts[step] < chunks:
                yield step._replace(chunk=counts[step])
            counts[step] += 1


class _Filled:
    """A writer of one worker's row that does a weight gradient when the next given action cannot start."""

    def __init__(self, order: Order, rank: int, limit: int) -> None:
        self._order, self._limit, self._alive = order, limit, 0
        self._given, self._owed = deque(order.actions[rank]), deque[Action]()
        self.row: list[Action] = []

    def next(self, done: Set[Action]) -> Action | None:
        """Append the action of the next unit of time and return it, or None where there is nothing to do."""
        if self._given and self._can_start(self._given[0], done):
            action = self._given.popleft()
        elif self._owed:
            action = self._owed.popleft()
        else:
            return None
        if action.kind == "I":
            self._owed.append(Action("W", action.stage, action.chunk))
        else:
            self._alive += 1 if action.kind == "F" else -1
        self.row.append(action)
        return action

    def _can_start(self, action: Action, done: Set[Action]) -> bool:
        upstream = self._order.upstream(action)
        return (upstream is None or upstream in done) and (action.kind != "F" or self._alive < self._limit)


def dualpipe_v(rank: int, workers: int, chunks: int) -> Iterator[Action]:
    """Yield DualPipe cut in half into a V (DeepSeek-AI, "DualPipe", 2025); needs M ≥ 2K.

    In the steady state a forward of one micro-batch is paired with the backward of another, on the
    worker's two stages by turns; weight gradients are split off where a bubble can be filled.
    """
    return iter(_DualPipeV(rank, workers).row(chunks))


class _DualPipeV:
    """A writer of one worker's row, phase by phase; ``out`` is its earlier stage, ``back`` its later one."""

    def __init__(self, rank: int, workers: int) -> None:
        self._rank, self._workers = rank, workers
        self._out, self._back = rank, 2 * workers - 1 - rank
        self._next: Counter[tuple[str, int]] = Counter()
        self._deferred: deque[Action] = deque()
        self._row: list[Action] = []

    def _forward(self, stage: int) -> None:
        self._row.append(Action("F", stage, self._next["F", stage]))
        self._next["F", stage] += 1

    def _backward(self, stage: int, *, split: bool = False) -> None:
        chunk = self._next["B", stage]
        self._next["B", stage] += 1
        self._row.append(Action("I" if split else "B", stage, chunk))
        if split:
            self._deferred.append(Action("W", stage, chunk))

    def _weight(self) -> None:
        self._row.append(self._deferred.popleft())

    def row(self, chunks: int) -> list[Action]:
        out, back, ahead = self._out, self._back, self._workers - self._rank - 1
        for _ in range(2 * ahead):
            self._forward(out)
        for _ in range(self._rank + 1):
            self._forward(out)
            self._forward(back)
        for _ in range(ahead):
            self._backward(back, split=True)
            self._weight()
            self._forward(back)
        for _ in range(chunks - 2 * self._workers + self._rank + 1):
            self._forward(out)
            self._backward(back)
            self._forward(back)
            self._backward(out)
        for _ in range(ahead):
            self._backward(back)
            self._forward(back)
            self._backward(out)
        split = False
        for turn in range(self._rank + 1):
            split = split or (turn == (self._rank + 1) // 2 and self._rank % 2 == 1)
            self._backward(back, split=split)
            split = split or (turn == (self._rank + 1) // 2 and self._rank % 2 == 0)
            self._backward(out, split=split)
        for _ in range(ahead):
            self._weight()
            self._backward(out, split=True)
        while self._deferred:
            self._weight()
        return self._row
