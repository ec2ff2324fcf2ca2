"""Forward only, in eval mode: every worker forwards stage by stage, micro-batch by micro-batch.

Batches follow each other without a gap: while one is collected the next are under way already.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple

from rpcpipe.driver.result import mean_loss
from rpcpipe.driver.runtime import Runtime
from rpcpipe.errors import ArgumentError, RpcPipeError, require
from rpcpipe.model.microbatch import Nest, copied, merge, unpack
from rpcpipe.stage.context import StepContext
from rpcpipe.stage.metrics import Metric, Sums, means
from rpcpipe.transport.interrupts import shield_interrupts
from rpcpipe.transport.pickling import dumps
from rpcpipe.worker.messages import Report
from rpcpipe.worker.operations import SetMetrics, SetSelection


class Passed(NamedTuple):
    """A batch: its samples, its micro-batches' shares of them, and what the workers report."""

    size: float
    weights: tuple[float, ...]
    reports: dict[str, Report]

    @property
    def output(self) -> Nest:
        """What the last stage kept, of the whole batch."""
        packed = {chunk: part for report in self.reports.values() for chunk, part in report.outputs.items()}
        return merge([unpack(packed[chunk]) for chunk in sorted(packed)])


class Passes:
    """Batches on their way through ``pipe``, which takes no other step meanwhile.

    To the workers each is a step of its own; ``ahead`` are fed beyond the one that is awaited. After a
    failure, and where the caller stops early, what is under way is dropped.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        # Their micro-batches fill the pipeline, and two more hide the driver's own time.
        self.ahead = -(-(runtime.layout.pipeline_size + 2) // runtime.chunks)

    def run(self, batches: Iterable[tuple[Nest, Nest | None]], *, keep_outputs: bool = False) -> Iterator[Passed]:
        """Each (inputs, targets) in their order; targets may be None where outputs are wanted."""
        runtime, waiting = self._runtime, deque[tuple[Passed, dict[str, Future[Any]]]]()
        runtime.enter(self)
        first = runtime.driver.places()
        try:
            for inputs, targets in batches:
                waiting.append(self._feed(inputs, targets, keep_outputs))
                if len(waiting) > self.ahead:
                    yield self._collect(*waiting.popleft())
            while waiting:
                yield self._collect(*waiting.popleft())
        except BaseException:
            with shield_interrupts():
                runtime.driver.cancel(runtime.driver.new_step(), first)
            raise
        finally:
            runtime.leave(self)

    def apply(self) -> None:
        """An optimizer's step in between."""
        raise RpcPipeError("batches run forward only now, there is nothing to apply; finish the iterator first")

    def forget(self) -> None:
        """Passes forward accumulate nothing."""

    def _feed(self, inputs: Nest, targets: Nest | None, keep_outputs: bool) -> tuple[Passed, dict[str, Future[Any]]]:
        runtime = self._runtime
        batch = runtime.program.cut(copied(inputs))
        answers = None
        if targets is not None:
            targets = copied(targets)
            answers = runtime.program.cut_targets(targets if keep_outputs else runtime.prepare(targets), batch)
        plan = StepContext(runtime.driver.new_step(), runtime.trained, False, batch.weights, keep_outputs=keep_outputs)
        calls = runtime.program.forward(batch.counts, targets=targets is not None)
        replies = runtime.driver.issue(calls, plan, runtime.given(batch.parts, answers))
        return Passed(batch.size, batch.weights, {}), replies

    def _collect(self, passed: Passed, replies: Mapping[str, Future[Any]]) -> Passed:
        return passed._replace(reports=self._runtime.driver.collect(replies))


def outputs(runtime: Runtime, batches: Iterable[Nest]) -> Iterator[Nest]:
    """The model's output for every batch of inputs."""
    for passed in Passes(runtime).run(((inputs, None) for inputs in batches), keep_outputs=True):
        yield passed.output


def tell_last_stage(runtime: Runtime, operation: SetMetrics | SetSelection) -> None:
    """Send ``operation``, about the outputs of the passes that follow, to the last stage in all replicas."""
    driver = runtime.driver
    driver.collect({worker: driver.call(worker, operation) for worker in runtime.stages[-1].workers})


def evaluate(
    runtime: Runtime, batches: Iterable[tuple[Nest, Nest]], metrics: Mapping[str, Metric]
) -> tuple[float, dict[str, float]]:
    """(mean loss over all samples, or over all that a loss of (sum, count) counts; each metric's mean)."""
    require("loss" not in metrics, "a metric cannot be named 'loss': the loss is reported beside the metrics")
    tell_last_stage(runtime, SetMetrics(dumps(dict(metrics), "what to measure")))
    total, samples, sums = 0.0, 0.0, list[Sums]()
    for size, weights, reports in Passes(runtime).run(batches):
        found = {chunk: value for report in reports.values() for chunk, value in report.metrics.items()}
        sums += [found[chunk] for chunk in sorted(found)]
        loss, count = mean_loss(reports, weights)
        share = size if count is None else count
        if share:
            total, samples = total + loss * share, samples + share
    if not samples:
        raise ArgumentError("evaluate needs at least one batch in which something counts")
    return total / samples, means(sums)
