"""A plan: the choice that the search found, what it was chosen over, and why, in a person's words."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

from rpcpipe import _tables, schedules
from rpcpipe.errors import PartitionError
from rpcpipe.planning.cost_model import Choice, Estimate
from rpcpipe.planning.layer_cost import copies
from rpcpipe.planning.partition import balance as cut
from rpcpipe.planning.search import Search
from rpcpipe.schedules import Timeline, bubble_fraction, optimal_microbatches

_HEADER = ("schedule", "checkpoint", "micro-batches", "seconds a step", "bubble", "memory", "")
_DEEP = 24  # layers, from the source document's guide
_TARGET = 0.1  # bubble


@dataclass(frozen=True, repr=False)
class Plan:
    """How to run a model: arguments for ``Pipeline``, what they were predicted to give, and why.

    ``seconds`` a step, ``bubble`` of the schedule, ``memory`` in bytes by worker of one replica.
    ``beaten``: the best of every other schedule. ``exact``: was every possibility tried?
    """

    schedule: str
    balance: tuple[int, ...]
    chunks: int
    virtual_stages: int
    checkpoint: str
    replicas: int
    shard_optimizer: bool
    micro_batch: int
    seconds: float
    bubble: float
    memory: tuple[float, ...]
    limit: float
    workers: int
    exact: bool
    why: tuple[str, ...]
    beaten: tuple[Estimate, ...]
    timeline: Timeline = field(compare=False)

    @property
    def arguments(self) -> dict[str, Any]:
        """What ``Pipeline(…, plan=plan)`` uses."""
        return {
            "schedule": self.schedule,
            "balance": list(self.balance),
            "chunks": self.chunks,
            "virtual_stages": self.virtual_stages,
            "checkpoint": self.checkpoint,
            "replicas": self.replicas,
            "shard_optimizer": self.shard_optimizer,
        }

    def __repr__(self) -> str:
        lines = [self._title(), *(f"  {name:<15} {value}" for name, value in self._facts()), "why", *self._reasons()]
        return "\n".join([*lines, "candidates, the best of each schedule", _tables.text(_HEADER, self._rows())])

    def _repr_html_(self) -> str:
        facts = _tables.markup(self._title(), ("", ""), [list(fact) for fact in self._facts()])
        return facts + _tables.markup("Candidates", _HEADER, self._rows())

    def _title(self) -> str:
        many = f", {self.replicas} replicas of {self.workers // self.replicas}" if self.replicas > 1 else ""
        return f"Plan for {self.workers} workers{many}: {self.seconds:.4g} s a step, bubble {self.bubble:.1%}"

    def _facts(self) -> list[tuple[str, str]]:
        limit = f" of {_tables.mebibytes(self.limit)}" if self.limit < math.inf else ""
        depth = self.workers // self.replicas
        return [
            ("schedule", f"{self.schedule}: {schedules.describe(self.schedule)}"),
            ("balance", _runs(self.balance)),
            (
                "micro-batches",
                f"{self.chunks} of {self.micro_batch} samples{', in each replica' if self.replicas > 1 else ''}",
            ),
            ("virtual stages", str(self.virtual_stages)),
            ("checkpoint", self.checkpoint),
            ("replicas", f"{self.replicas}{', the optimizer sharded over them' if self.shard_optimizer else ''}"),
            ("memory", f"at most {_tables.mebibytes(max(self.memory))}{limit} a worker"),
            (
                "formulas",
                f"bubble of gpipe and 1f1b (K - 1)/(K - 1 + M) = {bubble_fraction(depth, self.chunks):.1%};"
                f" {optimal_microbatches(depth, _TARGET)} micro-batches bring it to {_TARGET:.0%}",
            ),
        ]

    def _reasons(self) -> list[str]:
        return [f"  - {reason}" for reason in self.why]

    def _rows(self) -> list[list[str]]:
        return [_row(estimate) for estimate in sorted(self.beaten, key=lambda estimate: estimate.seconds)]


def _row(estimate: Estimate) -> list[str]:
    choice = estimate.choice
    deeper = f", v = {choice.virtual_stages}" if choice.virtual_stages > 1 else ""
    where = f"{choice.depth} workers × {choice.replicas}" if choice.replicas > 1 else ""
    sizes = f"{choice.chunks} × {choice.micro_batch}"
    peak = _tables.mebibytes(max(estimate.memory))
    return [
        choice.schedule + deeper, choice.checkpoint, sizes, f"{estimate.seconds:.4g}", f"{estimate.bubble:.1%}", peak,
        where,
    ]  # fmt: skip


def _runs(balance: Iterable[int]) -> str:
    """``[3, 4, 4, 4, 3]`` as "3, 3 × 4, 3"."""
    found: list[list[int]] = []
    for size in balance:
        if found and found[-1][1] == size:
            found[-1][0] += 1
        else:
            found.append([1, size])
    return ", ".join(f"{count} × {size}" if count > 1 else str(size) for count, size in found) + " layers"


def decide(search: Search) -> Plan:
    """The fastest plan that fits; PartitionError, saying what would, where none does."""
    found = search.best()
    if found is None:
        raise PartitionError(_refusal(search))
    choice = found.choice
    shown = choice if (shorter := choice.shorter()) is None else shorter[0]
    return Plan(
        choice.schedule,
        found.balance,
        choice.chunks,
        choice.virtual_stages,
        choice.checkpoint,
        choice.replicas,
        choice.sharded,
        choice.micro_batch,
        found.seconds,
        found.bubble,
        found.memory,
        search.machine.memory,
        choice.depth * choice.replicas,
        search.exact,
        tuple(_why(search, found)),
        tuple(_beaten(search, found)),
        search.costs.timeline(shown, found.balance),
    )


def _beaten(search: Search, found: Estimate) -> list[Estimate]:
    """The best of each schedule for as many workers in a row, and of each other number of workers."""
    by_depth: dict[int, Estimate] = {}
    alike = []
    for (_, depth), estimate in search.found.items():
        if depth == found.choice.depth:
            alike.append(estimate)
        elif estimate.beats(by_depth.get(depth)):
            by_depth[depth] = estimate
    return [*alike, *by_depth.values()]


# --- why: the source document's guide, with this model's figures ---


def _why(search: Search, found: Estimate) -> Iterable[str]:
    yield _depth(search)
    yield from _recomputation(search, found)
    yield _speed(search, found)
    yield _micro_batches(search, found)
    if found.choice.replicas > 1:
        yield _replicas(search, found)
    if not search.exact:
        yield (
            "the possibilities are too many to simulate each: those that promise most were, each with the cut that"
            " makes its slowest stage fastest, and in the best the slowest stage's borders were moved"
        )


def _depth(search: Search) -> str:
    layers, workers = search.layers, search.machine.workers
    deep = f"more than {_DEEP}: deep" if layers > _DEEP else f"not more than {_DEEP}: shallow"
    return f"the model has {layers} layers, {deep}, for {workers} workers"


def _recomputation(search: Search, found: Estimate) -> Iterable[str]:
    choice, limit = found.choice, search.machine.memory
    kept = replace(choice, checkpoint="never")
    needed = max(search.costs.memory(kept, [0, *accumulate(found.balance)]))
    if limit == math.inf:
        yield "no memory limit was given: nothing is recomputed unless that is free"
    elif choice.checkpoint == "never":
        yield (
            f"not memory-bound: {_tables.mebibytes(needed)} of {_tables.mebibytes(limit)} a worker without"
            " recomputation"
        )
    else:
        yield (
            f"memory-bound: without recomputation a worker would need {_tables.mebibytes(needed)} of"
            f" {_tables.mebibytes(limit)}; checkpoint={choice.checkpoint!r} brings that to"
            f" {_tables.mebibytes(max(found.memory))}"
        )
    if ("gpipe", choice.depth) not in search.found and choice.schedule != "gpipe" and limit < math.inf:
        yield "gpipe keeps the activations of all micro-batches, which does not fit"


def _speed(search: Search, found: Estimate) -> str:
    simple = search.found.get(("1f1b", found.choice.depth))
    if found.choice.schedule == "1f1b":
        return "1f1b is the first recommendation, and nothing that was tried beats it"
    if simple is None:
        return f"{found.choice.schedule} squeezes the bubble; 1f1b does not fit or was not worth simulating"
    gain = 1 - found.seconds / simple.seconds
    return f"{found.choice.schedule} squeezes the bubble: {gain:.1%} less time than 1f1b"


def _micro_batches(search: Search, found: Estimate) -> str:
    choice = found.choice
    if choice.depth == 1:
        return f"one worker in a row has no bubble; {choice.chunks} micro-batches are what its memory wants"
    many = "more than" if choice.chunks > 4 * choice.depth else "at most"
    return (
        f"{choice.chunks} micro-batches are {many} 4 × {choice.depth} workers in a row: equal stages would have a"
        f" bubble of {bubble_fraction(choice.depth, choice.chunks):.1%} under 1f1b"
    )


def _replicas(search: Search, found: Estimate) -> str:
    choice, model = found.choice, search.costs.models[found.choice.micro_batch]
    reduced = search.costs.all_reduce(choice.replicas, model.parameters[-1] / choice.depth)
    return (
        f"{choice.replicas} replicas of {choice.depth} workers: reducing the gradients takes {reduced:.3g} s,"
        f" a longer pipeline would have more bubble and a shorter one does not fit or reduces more"
    )


# --- when nothing fits ---


def _refusal(search: Search) -> str:
    limit, workers = search.machine.memory, search.machine.workers
    candidates = [choice for choice in search.choices() if choice.checkpoint == "always"]
    if not candidates:
        return (
            f"{search.layers} layers, {workers} workers and a batch of {search.batch} leave no schedule:"
            " use fewer workers, more micro-batches, or split the layers"
        )
    frugal = min(candidates, key=lambda c: (-c.depth, c.micro_batch, c.schedule != "1f1b", c.replicas))
    needed = _frugal(search, frugal)
    would = [f"{_tables.mebibytes(needed)} a worker"] if needed < math.inf else []
    if (more := _workers_that_fit(search, frugal)) is not None:
        would.append(f"{more} workers of {_tables.mebibytes(limit)}")
    model = search.costs.models[frugal.micro_batch]
    weights = copies(search.machine.moments) * model.parameters[-1]
    largest = max(b - a for a, b in pairwise(model.parameters))
    held = copies(search.machine.moments) * largest
    if held > limit:
        would.append(f"smaller layers: the largest alone takes {_tables.mebibytes(held)}")
    return (
        f"the model does not fit {_row_of(frugal, workers)} of {_tables.mebibytes(limit)}: its weights, gradients,"
        f" optimizer state and the copy that takes back a failed step are {_tables.mebibytes(weights)}, and with"
        f" everything recomputed and micro-batches of {frugal.micro_batch} the fullest worker needs"
        f" {_tables.mebibytes(needed)}."
        f" What would do: {', or '.join(would) or 'smaller layers'}"
    )


def _row_of(choice: Choice, workers: int) -> str:
    return f"{workers} workers" if choice.depth == workers else f"{choice.depth} in a row of {workers} workers"


def _frugal(search: Search, choice: Choice) -> float:
    """The fullest worker's bytes under the cut that makes it emptiest.

    More micro-batches than fill the pipeline change nothing under 1f1b.
    """
    choice = replace(choice, chunks=min(choice.chunks, 2 * choice.depth))
    model = search.costs.models[choice.micro_batch]
    held = choice.copies(search.machine.moments)
    sizes = [
        held * (p1 - p0) + (a1 - a0)
        for p0, p1, a0, a1 in zip(
            model.parameters, model.parameters[1:], model.activations, model.activations[1:], strict=False
        )
    ]
    return max(search.costs.memory(choice, [0, *accumulate(cut(sizes, choice.stages))]))


def _workers_that_fit(search: Search, choice: Choice) -> int | None:
    """The fewest workers in a row that would do, if any."""

    @functools.cache
    def fits(depth: int) -> bool:
        return _frugal(search, replace(choice, schedule="1f1b", virtual_stages=1, depth=depth)) <= search.machine.memory

    low, high = 1, min(search.layers, max(choice.chunks, 1))
    if not fits(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return high
