"""Measure on a cluster what a step takes beside its layers: a few steps of a small model, read off their timelines.

The work of the driver and of the workers' other threads is measured as CPU time, the rest as medians of elapsed time:
neither changes much where other processes use the machine as well.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn

from rpcpipe.cluster.cluster import Cluster
from rpcpipe.model.layers import LayerSpec
from rpcpipe.pipeline.pipeline import Pipeline
from rpcpipe.planning.overheads import Overheads
from rpcpipe.schedules import Action, Span, Timeline

_WIDTH, _CHUNKS, _STEPS = 512, 8, 5
_SMALL, _LARGE = 64, 512  # rows of a micro-batch: messages of 128 KiB and 1 MiB
_ROW_BYTES = 4 * _WIDTH
_CERTAIN = 1e-3  # a value produced so many seconds before the worker was free did not let it wait


class _Cpu(NamedTuple):
    """Seconds of CPU time of the driver, and of those threads of the workers that do not compute."""

    driver: float
    agents: float


class _Gaps(NamedTuple):
    """Seconds between a worker's actions: without a message, with one sent and one received, and those of a hop."""

    local: float
    message: float
    hop: float


@dataclass
class _Steps:
    """Steps of one size: their actions, seconds before the first and after the last one, CPU time, and gaps."""

    actions: int
    before: float
    after: float
    cpu: _Cpu
    gaps: _Gaps


def measure_overheads(cluster: Cluster, *, spare_core: bool) -> tuple[Overheads, float]:
    """Return what steps take beside their layers on ``cluster``, and the seconds for which a message is on its way.

    ``spare_core``: whether the host has cores that no worker computes on, so that dispatch takes no worker's time.
    """
    pipe = Pipeline(
        [LayerSpec(nn.Linear, _WIDTH, _WIDTH) for _ in cluster.workers], cluster, loss=nn.functional.mse_loss,
        optimizer=_optimizer, chunks=_CHUNKS,
    )  # fmt: skip
    with closing(pipe):
        one = _run(pipe, cluster, 1, 1)
        small, large = (_run(pipe, cluster, rows, _CHUNKS) for rows in (_SMALL, _LARGE))
    more = small.actions - one.actions
    call = max(0.0, small.before - one.before) / more
    cpu = sum(max(0.0, after - before) for before, after in zip(one.cpu, small.cpu, strict=True)) / more
    quick, slow = (max(0.0, steps.gaps.message - steps.gaps.local) for steps in (small, large))
    copy = max(0.0, slow - quick) / ((_LARGE - _SMALL) * _ROW_BYTES)
    overheads = Overheads(
        step=max(0.0, one.before - call * one.actions) + one.after,
        call=call,
        # Before the first action a second core is as busy: it lets go of what the last step has left.
        dispatch=0.0 if spare_core else max(0.0, cpu - 2 * call),
        action=small.gaps.local,
        message=max(0.0, quick - copy * _SMALL * _ROW_BYTES) / 2,
        copy=copy,
    )
    return overheads, max(0.0, small.gaps.hop - quick)


def _optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def _run(pipe: Pipeline, cluster: Cluster, rows: int, chunks: int) -> _Steps:
    """Run steps of ``chunks`` micro-batches of ``rows``, the first one to warm up."""
    x = torch.zeros(rows * chunks, _WIDTH)
    pipe.chunks = chunks
    pipe.train_step(x, x)
    before, after, gaps, start = [], [], [], _cpu(cluster)
    for _ in range(_STEPS):
        with pipe.trace() as timeline:
            began = time.monotonic()
            pipe.train_step(x, x)
            ended = time.monotonic()
        actions, updates = _actions(timeline), [span for span in timeline.spans if span.kind == "U"]
        before.append(min(span.start for span in actions) - began)
        last = max(updates, key=lambda span: span.end)  # others may have updated while actions still ran
        after.append(ended - max(span.end for span in actions) - (last.end - last.start))
        gaps.append(_gaps(timeline))
    cpu = _Cpu(*((after - before) / _STEPS for before, after in zip(start, _cpu(cluster), strict=True)))
    # A step's median, of the step that was disturbed least: who takes the core from a worker makes gaps longer.
    least = _Gaps(*(min(filter(None, column), default=0.0) for column in zip(*gaps, strict=True)))
    return _Steps(sum(map(len, pipe.schedule.actions)), statistics.median(before), statistics.median(after), cpu, least)


def _gaps(timeline: Timeline) -> _Gaps:
    """Return the medians of one step's gaps, 0 where there is none."""
    spans = {Action(span.kind, span.stage, span.chunk): span for span in _actions(timeline)}  # type: ignore[arg-type]
    sent = {move.producer for move in timeline.transfers}
    produced = {move.consumer: spans[move.producer].end for move in timeline.transfers}
    local, message, hop = [], [], []
    for worker in range(timeline.workers):
        row = sorted((span.start, span.end, action) for action, span in spans.items() if span.worker == worker)
        for (_, free, before), (start, _, action) in pairwise(row):
            if action not in produced:
                if before not in sent:
                    local.append(start - free)
            elif produced[action] > free:
                hop.append(start - produced[action])
            elif produced[action] < free - _CERTAIN and before in sent:
                message.append(start - free)
    return _Gaps(*(statistics.median(found) if found else 0.0 for found in (local, message, hop)))


def _actions(timeline: Timeline) -> list[Span]:
    return [span for span in timeline.spans if span.kind != "U"]


def _cpu(cluster: Cluster) -> _Cpu:
    agents = sum(cluster.call(worker, _other_threads) for worker in cluster.workers)
    return _Cpu(time.process_time(), agents)


def _other_threads() -> float:
    """Return the seconds of CPU time that this process has taken beside this thread, which computes."""
    return time.process_time() - time.thread_time()
