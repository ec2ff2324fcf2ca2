"""Forward only, in eval mode: every worker forwards stage by stage, micro-batch by micro-batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rpcpipe import schedules
from rpcpipe.messages import Report, Route, StepPlan
from rpcpipe.microbatch import Nest, batch_size, merge, split, unpack
from rpcpipe.program import compile_routes, given
from rpcpipe.result import mean_loss

if TYPE_CHECKING:
    from rpcpipe.pipeline import Pipeline


def outputs(pipe: Pipeline, inputs: Nest) -> Nest:
    """The model's output for the batch ``inputs``."""
    parts = split(inputs, pipe.chunks)
    reports = _run(pipe, parts, None, ())
    found = {chunk: unpack(output) for report in reports.values() for chunk, output in report.outputs.items()}
    return merge([found[chunk] for chunk in range(len(parts))])


def mean_loss_over(pipe: Pipeline, batches: Iterable[tuple[Nest, Nest]]) -> float:
    """The mean loss over all samples, or over all that a loss of (sum, count) counts."""
    total, samples = 0.0, 0.0
    for inputs, targets in batches:
        parts, weights = pipe._cut_batch(inputs)
        loss, count = mean_loss(_run(pipe, parts, split(targets, pipe.chunks), weights), weights)
        share = float(batch_size(inputs)) if count is None else count
        if share:
            total, samples = total + loss * share, samples + share
    if not samples:
        raise ValueError("evaluate needs at least one batch in which something counts")
    return total / samples


def _run(
    pipe: Pipeline, parts: list[Nest], targets: list[Nest] | None, weights: tuple[float, ...]
) -> dict[str, Report]:
    plan = StepPlan(pipe._driver.new_step(), pipe.trained, False, weights, keep_outputs=targets is None)
    routes = _routes(pipe, len(parts), targets=targets is not None)
    return pipe._driver.run(routes, plan, given(parts, targets, pipe.schedule.stages))


def _routes(pipe: Pipeline, chunks: int, *, targets: bool) -> list[tuple[str, Route]]:
    key = ("forward", chunks, targets)
    if key not in pipe._routes:
        schedule = schedules.forward_only(pipe.schedule, chunks)
        pipe._routes[key] = compile_routes(schedule, pipe._names, targets=targets)
    return pipe._routes[key]
