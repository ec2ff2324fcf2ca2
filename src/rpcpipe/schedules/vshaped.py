"""Schedules that hold two stages per worker, laid out in a V: worker k has stages k and 2K - 1 - k.

The last stage is on the worker of the first, so the loss's gradient starts back without a transfer.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence

from rpcpipe.schedules.action import Action, Kind
from rpcpipe.schedules.order import Order


def v_placement(workers: int) -> tuple[int, ...]:
    """Return the worker of every stage: 0 … K - 1 down the workers, K … 2K - 1 back up."""
    return (*range(workers), *reversed(range(workers)))


# In which order a free worker tries kinds of action, on its later ("back") or earlier ("out") stage.
_Preference = Sequence[tuple[Kind, str]]
_PREFERENCES: tuple[_Preference, ...] = (
    (("I", "back"), ("I", "out"), ("F", "back"), ("F", "out"), ("W", "any")),
    (("I", "back"), ("I", "out"), ("F", "back"), ("W", "any"), ("F", "out")),
    (("I", "back"), ("F", "back"), ("I", "out"), ("F", "out"), ("W", "any")),
)


def zb_v(workers: int, chunks: int) -> list[list[Action]]:
    """Return each worker's row of zero bubble in a V.

    (Qi et al., "Pipeline Parallelism with Controllable Memory", section 4.) The rows are found by list
    scheduling with unit costs: in every unit of time each free worker takes the first action it can in an
    order of preference, with at most 2K to 2K + 3 activations alive. The first attempt in which the last
    worker to start works without a gap is returned, or else the shortest: at F = I = W and M ≥ 2K the
    makespan is M(F + B) + (K - 1)F/2, where F and B are those of a worker's two stages together.
    """
    best: tuple[int, list[list[Action]]] | None = None
    for limit in range(2 * workers, 2 * workers + 4):
        for preference in _PREFERENCES:
            attempt = _ListScheduler(workers, chunks, preference, limit).run()
            if best is None or attempt[0] < best[0]:
                best = attempt
            if best[0] == 6 * chunks + workers - 1:
                return best[1]
    assert best is not None
    return best[1]


class _ListScheduler:
    """A list scheduler that advances all workers in lockstep, one unit of time per action."""

    def __init__(self, workers: int, chunks: int, preference: _Preference, limit: int) -> None:
        self._workers, self._chunks, self._preference, self._limit = workers, chunks, preference, limit
        # Dependencies need to know only that every backward is split; the sequence of this row does not matter.
        stages = range(2 * workers)
        split = tuple(Action("I", stage, chunk) for stage in stages for chunk in range(chunks))
        self._rules = Order("zb-v", chunks, v_placement(workers), (split,))
        self._next: Counter[tuple[Kind, int]] = Counter()
        self._done: set[Action] = set()

    def run(self) -> tuple[int, list[list[Action]]]:
        """Return (makespan in units of time, rows)."""
        rows: list[list[Action]] = [[] for _ in range(self._workers)]
        time = 0
        while len(self._done) < 3 * self._chunks * 2 * self._workers:
            chosen = [self._choose(worker) for worker in range(self._workers)]
            for row, action in zip(rows, chosen, strict=True):
                if action is not None:
                    row.append(action)
                    self._done.add(action)
                    self._next[action.kind, action.stage] += 1
            time += 1
        return time, rows

    def _choose(self, worker: int) -> Action | None:
        stages = {"out": worker, "back": 2 * self._workers - 1 - worker}
        alive = sum(self._next["F", stage] - self._next["W", stage] for stage in stages.values())
        for kind, which in self._preference:
            if kind == "W":
                late = max(stages.values(), key=lambda stage: self._next["I", stage] - self._next["W", stage])
                if self._next["W", late] < self._next["I", late]:
                    return Action("W", late, self._next["W", late])
                continue
            stage = stages[which]
            # A slot is kept for the later stage: without its forward nothing would ever come back.
            reserve = 1 if which == "out" and self._next["F", stages["back"]] < self._chunks else 0
            if kind == "F" and alive >= self._limit - reserve:
                continue
            if self._ready(action := Action(kind, stage, self._next[kind, stage])):
                return action
        return None

    def _ready(self, action: Action) -> bool:
        return action.chunk < self._chunks and all(needed in self._done for needed in self._rules.dependencies(action))


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
