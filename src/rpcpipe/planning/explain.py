"""The reasons for a plan, and what would fit where nothing does, in words.

The rules of thumb are those of the project's source document, applied to this model's figures.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import accumulate

from rpcpipe import _tables
from rpcpipe.planning import partition
from rpcpipe.planning.cost_model import SIMPLEST, Candidate, Estimate
from rpcpipe.planning.search import CHECKPOINTS, Search
from rpcpipe.schedules import bubble_fraction, traits

_DEEP = 24  # A model of more layers counts as deep.
_SIMPLE = SIMPLEST[0]  # others are compared with it
_GREEDY = next(name for name in SIMPLEST if traits(name).keeps_all)


def reasons(search: Search, best: Estimate) -> Iterable[str]:
    """Yield one sentence for each decision that led to ``best``."""
    yield _depth(search)
    yield from _undo(search, best)
    yield from _recomputation(search, best)
    yield _speed(search, best)
    yield _micro_batches(best)
    if best.candidate.replicas > 1:
        yield _replicas(search, best)
    if not search.exact:
        yield (
            "the possibilities are too many to simulate each: those that promise most were, each with the cut that"
            " makes its slowest stage fastest, and in the best the slowest stage's borders were moved"
        )


def _depth(search: Search) -> str:
    layers, workers = search.layers, search.machine.workers
    deep = f"more than {_DEEP}: deep" if layers > _DEEP else f"not more than {_DEEP}: shallow"
    return f"the model has {layers} layers, {deep}, for {workers} workers"


def _undo(search: Search, best: Estimate) -> Iterable[str]:
    if best.candidate.undo == "copy":
        return
    copied = replace(best.candidate, undo="copy")
    needed = max(search.cost_model.memory(copied, [0, *accumulate(best.balance)]))
    yield (
        "undo='off': no plan fits with a copy of weights and optimizer state, with which this one would take"
        f" {_tables.mebibytes(needed)} of {_tables.mebibytes(search.machine.memory)} a worker. An optimizer that raises"
        " or a worker that dies in an update leaves nothing to go on from but a snapshot or a checkpoint"
    )


def _recomputation(search: Search, best: Estimate) -> Iterable[str]:
    candidate, limit = best.candidate, search.machine.memory
    without = replace(candidate, checkpoint="never")
    needed = max(search.cost_model.memory(without, [0, *accumulate(best.balance)]))
    if limit == math.inf:
        yield "no memory limit was given: nothing is recomputed unless that is free"
    elif candidate.checkpoint == "never":
        yield (
            f"not memory-bound: {_tables.mebibytes(needed)} of {_tables.mebibytes(limit)} a worker without"
            " recomputation"
        )
    else:
        yield (
            f"memory-bound: without recomputation a worker would need {_tables.mebibytes(needed)} of"
            f" {_tables.mebibytes(limit)}; checkpoint={candidate.checkpoint!r} brings that to"
            f" {_tables.mebibytes(max(best.memory))}"
        )
    if limit < math.inf and (_GREEDY, candidate.depth) not in search.best_by_schedule:
        yield f"{_GREEDY} keeps the activations of all micro-batches, which does not fit"


def _speed(search: Search, best: Estimate) -> str:
    schedule = best.candidate.schedule
    simple = search.best_by_schedule.get((_SIMPLE, best.candidate.depth))
    if schedule == _SIMPLE:
        return f"{_SIMPLE} is the first recommendation, and nothing that was tried beats it"
    if simple is None:
        return f"{schedule} squeezes the bubble; {_SIMPLE} does not fit or was not worth simulating"
    return f"{schedule} squeezes the bubble: {1 - best.seconds / simple.seconds:.1%} less time than {_SIMPLE}"


def _micro_batches(best: Estimate) -> str:
    chunks, depth = best.candidate.chunks, best.candidate.depth
    if depth == 1:
        return "one worker in a row has no bubble, however many micro-batches there are"
    many = "more than" if chunks > 4 * depth else "at most"
    return (
        f"{chunks} micro-batches are {many} 4 × {depth} workers in a row: equal stages would have a"
        f" bubble of {bubble_fraction(depth, chunks):.1%} under {_SIMPLE}"
    )


def _replicas(search: Search, best: Estimate) -> str:
    candidate, sums = best.candidate, search.cost_model.sums[best.candidate.micro_batch]
    seconds = search.cost_model.all_reduce(candidate.replicas, sums.parameters[-1] / candidate.depth)
    return (
        f"{candidate.replicas} replicas of {candidate.depth} workers: reducing the gradients takes {seconds:.3g} s,"
        f" a longer pipeline would have more bubble and a shorter one does not fit or reduces more"
    )


def cheaper(search: Search, best: Estimate) -> Iterable[str]:
    """Yield what would take less memory than ``best`` with the same cut, the fastest first."""
    candidate, model = best.candidate, search.cost_model
    fullest = max(best.memory)
    changes: list[tuple[str, Candidate]] = []
    if candidate.undo == "copy":
        changes.append(("undo='off'", replace(candidate, undo="off")))
    if candidate.replicas > 1 and not candidate.sharded:
        changes.append(("shard_optimizer=True", replace(candidate, sharded=True)))
    changes += [(f"checkpoint={mode!r}", replace(candidate, checkpoint=mode)) for mode in CHECKPOINTS]
    changes += [
        (
            f"micro-batches of {size}",
            replace(candidate, micro_batch=size, chunks=-(-search.batch // candidate.replicas // size)),
        )
        for size in model.sums
        if size < candidate.micro_batch
    ]
    found = [(model.estimate(changed, best.balance), what) for what, changed in changes]
    smaller = sorted((one.seconds, what, max(one.memory)) for one, what in found if max(one.memory) < fullest)
    for seconds, what, memory in smaller:
        yield f"{what}: {_tables.mebibytes(memory)} instead of {_tables.mebibytes(fullest)}, {seconds:.4g} s a step"
    if not smaller:
        yield "nothing with these layers in one worker: more workers, or smaller layers"


def without_copy(best: Estimate, other: Estimate) -> str:
    """Return what ``other``, which has no copy to take an update back from, would give instead of ``best``."""
    candidate = other.candidate
    where = f"{candidate.replicas} replicas of {candidate.depth} workers" if candidate.replicas > 1 else ""
    sharded = "the optimizer sharded" if candidate.sharded else ""
    sizes = f"{candidate.chunks} micro-batches of {candidate.micro_batch}"
    way = ", ".join(filter(None, (candidate.schedule, where, sharded, sizes, f"checkpoint={candidate.checkpoint!r}")))
    return (
        f"undo='off': {other.seconds:.4g} s a step instead of {best.seconds:.4g}, at most"
        f" {_tables.mebibytes(max(other.memory))} a worker ({way})"
    )


def refusal(search: Search) -> str:
    """Return the message for a search that found nothing: how much memory is missing, and what would fit."""
    limit, workers = search.machine.memory, search.machine.workers
    candidates = [candidate for candidate in search.candidates() if candidate.checkpoint == "always"]
    if not candidates:
        return (
            f"{search.layers} layers, {workers} workers and a batch of {search.batch} leave no schedule:"
            " use fewer workers, more micro-batches, or split the layers"
        )
    frugal = min(candidates, key=lambda c: (-c.depth, c.micro_batch, c.schedule != _SIMPLE, c.replicas))
    needed = _least_memory(search, frugal)
    sums = search.cost_model.sums[frugal.micro_batch]
    weights = sums.held(replace(frugal, replicas=1), 0, sums.layers).total
    without = (
        ", without a copy to take back a failed update (undo='off'),"
        if frugal.undo == "off"
        else (" and the copy that takes back a failed update")
    )
    remedies = ", or ".join(_remedies(search, frugal, needed)) or "smaller layers"
    snapshots = " snapshots for the loss of a host," if search.machine.healing.hosts else ""
    return (
        f"the model does not fit {_workers_of(frugal, workers)} of {_tables.mebibytes(limit)}: its weights, gradients,"
        f" optimizer state{without} are {_tables.mebibytes(weights)}, and with{snapshots}"
        f" everything recomputed and micro-batches of {frugal.micro_batch} the fullest worker needs"
        f" {_tables.mebibytes(needed)}."
        f" What would do: {remedies}"
    )


def _remedies(search: Search, frugal: Candidate, needed: float) -> Iterable[str]:
    """Yield the changes that would let ``frugal`` fit; ``needed``: bytes of its fullest worker."""
    limit = search.machine.memory
    if needed < math.inf:
        yield f"{_tables.mebibytes(needed)} a worker"
    if (more := _workers_that_fit(search, frugal)) is not None:
        yield f"{more} workers of {_tables.mebibytes(limit)}"
    sums = search.cost_model.sums[frugal.micro_batch]
    largest = max(search.cost_model.least_bytes(frugal, at, at + 1) for at in range(sums.layers))
    if largest > limit:
        yield f"smaller layers: the largest alone takes {_tables.mebibytes(largest)}"


def _workers_of(candidate: Candidate, workers: int) -> str:
    if candidate.depth == workers:
        return f"{workers} workers"
    return f"{candidate.depth} in a row of {workers} workers"


def _least_memory(search: Search, candidate: Candidate) -> float:
    """Return the fullest worker's bytes under the partition that balances memory.

    More micro-batches than fill the pipeline change nothing under 1f1b, so fewer are simulated.
    """
    candidate = replace(candidate, chunks=min(candidate.chunks, 2 * candidate.depth))
    sums = search.cost_model.sums[candidate.micro_batch]
    sizes = [
        sums.held(candidate, at, at + 1).total + sums.activations[at + 1] - sums.activations[at]
        for at in range(sums.layers)
    ]
    return max(search.cost_model.memory(candidate, [0, *accumulate(partition.balance(sizes, candidate.stages))]))


def _workers_that_fit(search: Search, candidate: Candidate) -> int | None:
    """Return the fewest workers in a row on which ``candidate`` would fit under 1f1b, or None."""

    @functools.cache
    def fits(depth: int) -> bool:
        alike = replace(candidate, schedule=_SIMPLE, virtual_stages=1, depth=depth)
        return _least_memory(search, alike) <= search.machine.memory

    low, high = 1, min(search.layers, max(candidate.chunks, 1))
    if not fits(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return high
