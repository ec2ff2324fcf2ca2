"""A plan: the best candidate of a search, what it was chosen over, and why."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from rpcpipe import _tables, schedules
from rpcpipe.errors import PartitionError
from rpcpipe.planning.cost_model import Estimate
from rpcpipe.planning.explain import cheaper, reasons, refusal, without_copy
from rpcpipe.planning.layer_cost import UNDO
from rpcpipe.planning.loss_cost import LossCost
from rpcpipe.planning.search import Search
from rpcpipe.planning.worker_memory import WorkerMemory, picture, table
from rpcpipe.schedules import Timeline, bubble_fraction, optimal_microbatches

_HEADER = ("schedule", "checkpoint", "micro-batches", "seconds a step", "bubble", "memory", "")
_TARGET = 0.1  # bubble
_CLEARLY = 1.02  # times as long is worth a word


@dataclass(frozen=True, repr=False, kw_only=True)
class Plan:
    """How to run a model: arguments for ``Pipeline``, the figures predicted for them, and the reasons.

    ``best``: the candidate chosen, its partition and figures. ``limit``: bytes that a worker may hold.
    ``exact``: whether every possibility was tried. ``beaten``: the best of every other schedule.
    ``timeline``: the step, of a long one the beginning. ``loss``: what the loss of a worker costs. ``parts``: what the
    memory of each worker of one replica is. ``cheaper``: what would take less memory, the fastest first.
    ``without_copy``: the best plan without a copy, where that is faster than this one, which has a copy; else None.
    """

    best: Estimate
    limit: float
    exact: bool
    why: tuple[str, ...]
    beaten: tuple[Estimate, ...]
    timeline: Timeline = field(compare=False)
    loss: LossCost
    parts: tuple[WorkerMemory, ...]
    cheaper: tuple[str, ...]
    without_copy: Estimate | None = None

    @property
    def schedule(self) -> str:
        """The schedule's name."""
        return self.best.candidate.schedule

    @property
    def balance(self) -> tuple[int, ...]:
        """Layers per stage."""
        return self.best.balance

    @property
    def chunks(self) -> int:
        """Micro-batches of a step, in each replica."""
        return self.best.candidate.chunks

    @property
    def virtual_stages(self) -> int:
        """Stages per worker."""
        return self.best.candidate.virtual_stages

    @property
    def checkpoint(self) -> str:
        """Which activations are recomputed: "never", "except_last" or "always"."""
        return self.best.candidate.checkpoint

    @property
    def replicas(self) -> int:
        """The number of pipelines."""
        return self.best.candidate.replicas

    @property
    def shard_optimizer(self) -> bool:
        """Whether the replicas share the optimizer's state."""
        return self.best.candidate.sharded

    @property
    def undo(self) -> str:
        """Whether there is a copy to take an update back from: "copy" or "off"."""
        return self.best.candidate.undo

    @property
    def micro_batch(self) -> int:
        """Samples in a micro-batch."""
        return self.best.candidate.micro_batch

    @property
    def workers(self) -> int:
        """Workers of all replicas together."""
        return self.best.candidate.depth * self.replicas

    @property
    def seconds(self) -> float:
        """Predicted seconds of a step."""
        return self.best.seconds

    @property
    def bubble(self) -> float:
        """Predicted idle share of the schedule."""
        return self.best.bubble

    @property
    def memory(self) -> tuple[float, ...]:
        """Predicted bytes by worker of one replica."""
        return self.best.memory

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments that ``Pipeline(…, plan=plan)`` uses."""
        return {
            "schedule": self.schedule,
            "balance": list(self.balance),
            "chunks": self.chunks,
            "virtual_stages": self.virtual_stages,
            "checkpoint": self.checkpoint,
            "replicas": self.replicas,
            "shard_optimizer": self.shard_optimizer,
            "undo": self.undo,
        }

    def __repr__(self) -> str:
        lines = [self._title(), *(f"  {name:<15} {value}" for name, value in self._facts())]
        lines += ["why", *(f"  - {reason}" for reason in self.why)]
        lines += ["memory of a worker at its peak", _tables.text(*table(self.parts))]
        if self.without_copy is not None:
            lines += ["next cheaper choice", f"  - {without_copy(self.best, self.without_copy)}"]
        lines += ["what would take less memory, the fastest first", *(f"  - {one}" for one in self.cheaper)]
        return "\n".join([*lines, "candidates, the best of each schedule", _tables.text(_HEADER, self._rows())])

    def _repr_html_(self) -> str:
        facts = _tables.markup(self._title(), ("", ""), [list(fact) for fact in self._facts()])
        memory = _tables.markup("Memory of a worker at its peak", *table(self.parts))
        return facts + memory + _tables.markup("Candidates", _HEADER, self._rows())

    def memory_svg(self) -> str:
        """Return a picture of every worker's memory, as SVG."""
        return picture(self.parts, self.limit, self._title())

    def _title(self) -> str:
        many = f", {self.replicas} replicas of {self.workers // self.replicas}" if self.replicas > 1 else ""
        return f"Plan for {self.workers} workers{many}: {self.seconds:.4g} s a step, bubble {self.bubble:.1%}"

    def _facts(self) -> list[tuple[str, str]]:
        limit = f" of {_tables.mebibytes(self.limit)}" if self.limit < math.inf else ""
        depth = self.best.candidate.depth
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
            ("undo", self.undo),
            ("memory", f"at most {_tables.mebibytes(max(self.memory))}{limit} a worker"),
            ("a lost worker", f"sets training back by {self.loss.worker_seconds:.3g} s at most, and takes no memory"),
            ("a lost host", self._host_loss()),
            (
                "formulas",
                f"bubble of gpipe and 1f1b (K - 1)/(K - 1 + M) = {bubble_fraction(depth, self.chunks):.1%};"
                f" {optimal_microbatches(depth, _TARGET)} micro-batches bring it to {_TARGET:.0%}",
            ),
        ]

    def _host_loss(self) -> str:
        extra = _tables.mebibytes(max(self.loss.snapshot_bytes))
        seconds = self.loss.host_seconds
        back = f"by {seconds:.3g} s at most" if seconds < math.inf else "by as much as snapshots are apart"
        counted = any(part.snapshots for part in self.parts)
        taken = "at most, which is counted" if counted else "more a worker, with several hosts"
        return f"sets training back {back}; snapshots take {extra} {taken}"

    def _rows(self) -> list[list[str]]:
        return [_row(estimate) for estimate in sorted(self.beaten, key=lambda estimate: estimate.seconds)]


def _row(estimate: Estimate) -> list[str]:
    candidate = estimate.candidate
    deeper = f", v = {candidate.virtual_stages}" if candidate.virtual_stages > 1 else ""
    where = f"{candidate.depth} workers × {candidate.replicas}" if candidate.replicas > 1 else ""
    sizes = f"{candidate.chunks} × {candidate.micro_batch}"
    peak = _tables.mebibytes(max(estimate.memory))
    return [
        candidate.schedule + deeper, candidate.checkpoint, sizes, f"{estimate.seconds:.4g}", f"{estimate.bubble:.1%}",
        peak, where,
    ]  # fmt: skip


def _runs(balance: Iterable[int]) -> str:
    """Write ``[3, 4, 4, 4, 3]`` as "3, 3 × 4, 3"."""
    runs: list[list[int]] = []
    for size in balance:
        if runs and runs[-1][1] == size:
            runs[-1][0] += 1
        else:
            runs.append([1, size])
    return ", ".join(f"{count} × {size}" if count > 1 else str(size) for count, size in runs) + " layers"


def decide(search: Search, undo: str | None = None) -> Plan:
    """Return the fastest plan that fits. Raises PartitionError, saying what would fit, where none does.

    ``undo``: of the plan; None for "copy" where a plan with it fits, and else "off".
    """
    for wanted in UNDO if undo is None else (undo,):
        search = search.anew(wanted)
        if (best := search.best()) is not None:
            break
    else:
        raise PartitionError(refusal(search))
    shorter = best.candidate.shorter()
    shown = best.candidate if shorter is None else shorter[0]
    return Plan(
        best=best,
        limit=search.machine.memory,
        exact=search.exact,
        why=tuple(reasons(search, best)),
        beaten=tuple(_beaten(search, best)),
        timeline=search.cost_model.timeline(shown, best.balance),
        loss=search.cost_model.loss_of(best),
        parts=search.cost_model.parts(best.candidate, [0, *accumulate(best.balance)]),
        cheaper=tuple(cheaper(search, best)),
        without_copy=_without_copy(search, best) if undo is None else None,
    )


def _without_copy(search: Search, best: Estimate) -> Estimate | None:
    """Return the best estimate without a copy if ``best`` has one and that is clearly faster."""
    if best.candidate.undo != "copy" or search.machine.memory == math.inf:
        return None
    return search.anew("off").best_below(best.seconds / _CLEARLY)


def _beaten(search: Search, best: Estimate) -> list[Estimate]:
    """Return the best of each schedule at the chosen depth, and the best of each other depth."""
    by_depth: dict[int, Estimate] = {}
    same_depth = []
    for (_, depth), estimate in search.best_by_schedule.items():
        if depth == best.candidate.depth:
            same_depth.append(estimate)
        elif estimate.beats(by_depth.get(depth)):
            by_depth[depth] = estimate
    return [*same_depth, *by_depth.values()]
