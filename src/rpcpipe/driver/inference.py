"""Forward passes only, in eval mode: every worker runs its stages' forwards, micro-batch by micro-batch.

Batches follow each other without a gap: while the driver collects one batch, the next ones are under way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple

from rpcpipe.driver.result import mean_loss, merged_outputs
from rpcpipe.driver.runtime import Runtime
from rpcpipe.errors import ArgumentError, StateError, require
from rpcpipe.model.microbatch import Nest, copied
from rpcpipe.stage.context import StepContext
from rpcpipe.stage.metrics import Metric, Sums, means
from rpcpipe.transport.interrupts import shield_interrupts
from rpcpipe.transport.user_pickling import named_dumps
from rpcpipe.worker.messages import Report
from rpcpipe.worker.operations import SetMetrics, SetSelection


class Wanted(NamedTuple):
    """What a training step reports beside its loss: metrics on the last stage, and the outputs."""

    measures: bool = False
    outputs: bool = False

    @classmethod
    def of(cls, runtime: Runtime, metrics: Mapping[str, Metric] | None, outputs: bool) -> Wanted:
        """Tell the last stage which ``metrics`` to compute, and return what the step is to report."""
        if not metrics:
            return cls(outputs=outputs)
        for name, metric in metrics.items():
            require(callable(metric), f"metric {name!r} must be callable as metric(output, target), not {metric!r}")
        tell_last_stage(runtime, SetMetrics(named_dumps(dict(metrics), "what to measure")))
        return cls(measures=True, outputs=outputs)


NOTHING = Wanted()


class Passed(NamedTuple):
    """A batch: its number of samples, its micro-batches' shares of it, and the workers' reports."""

    size: float
    weights: tuple[float, ...]
    reports: dict[str, Report]

    @property
    def output(self) -> Nest:
        """The outputs of the whole batch that the last stage kept."""
        return merged_outputs(self.reports)


class Passes:
    """Batches that pass through a pipeline, which takes no other step meanwhile.

    For the workers each batch is a separate step; ``ahead`` batches are fed beyond the one that is awaited. After
    a failure, and where the caller stops early, the batches under way are dropped.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        # As many micro-batches as there are workers fill the pipeline, and two more hide the driver's time.
        self.ahead = -(-(runtime.layout.pipeline_size + 2) // runtime.chunks)

    def run(self, batches: Iterable[tuple[Nest, Nest | None]], *, keep_outputs: bool = False) -> Iterator[Passed]:
        """Run every (inputs, targets) and yield the results in order. Targets may be None with ``keep_outputs``."""
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
        """Raise StateError: there is no update to apply."""
        raise StateError("batches run forward only now, there is nothing to apply; finish the iterator first")

    def forget(self) -> None:
        """Do nothing: forward passes accumulate no gradients."""

    def _feed(self, inputs: Nest, targets: Nest | None, keep_outputs: bool) -> tuple[Passed, dict[str, Future[Any]]]:
        """Issue one batch; return it without reports, and the workers' replies."""
        runtime = self._runtime
        batch = runtime.program.cut(copied(inputs))
        target_parts = None
        if targets is not None:
            targets = copied(targets)
            target_parts = runtime.program.cut_targets(targets if keep_outputs else runtime.prepare(targets), batch)
        plan = StepContext(runtime.driver.new_step(), runtime.trained, False, batch.weights, keep_outputs=keep_outputs)
        program = runtime.program.forward(batch.counts, targets=targets is not None)
        replies = runtime.driver.issue(program, plan, runtime.given(batch.parts, target_parts))
        return Passed(batch.size, batch.weights, {}), replies

    def _collect(self, passed: Passed, replies: Mapping[str, Future[Any]]) -> Passed:
        return passed._replace(reports=self._runtime.driver.collect(replies))


def outputs(runtime: Runtime, batches: Iterable[Nest]) -> Iterator[Nest]:
    """Yield the model's output for every batch of inputs."""
    for passed in Passes(runtime).run(((inputs, None) for inputs in batches), keep_outputs=True):
        yield passed.output


def tell_last_stage(runtime: Runtime, operation: SetMetrics | SetSelection) -> None:
    """Execute ``operation``, which holds for all later passes, on the last stage of every replica."""
    driver = runtime.driver
    driver.collect({worker: driver.call(worker, operation) for worker in runtime.stages[-1].workers})


def evaluate(
    runtime: Runtime, batches: Iterable[tuple[Nest, Nest]], metrics: Mapping[str, Metric]
) -> tuple[float, dict[str, float]]:
    """Return (mean loss, mean of each metric) over ``batches``.

    The mean loss is over all samples, or over the total count where the loss returns (sum, count). Raises
    ArgumentError for a metric named ``loss``, and if nothing counts in any batch.
    """
    require(
        runtime.settings.has_loss,
        "evaluate needs the loss that this pipeline was made without: make one with loss=…, or compare the outputs of"
        " pipe.predict with the targets",
        error=StateError,
    )
    require("loss" not in metrics, "a metric cannot be named 'loss': the loss is reported beside the metrics")
    tell_last_stage(runtime, SetMetrics(named_dumps(dict(metrics), "what to measure")))
    total, samples, sums = 0.0, 0.0, list[Sums]()
    for size, weights, reports in Passes(runtime).run(batches):
        measured = {chunk: value for report in reports.values() for chunk, value in report.metrics.items()}
        sums += [measured[chunk] for chunk in sorted(measured)]
        loss, count = mean_loss(reports, weights)
        share = size if count is None else count
        if share:
            total, samples = total + loss * share, samples + share
    if not samples:
        raise ArgumentError("evaluate needs at least one batch in which something counts")
    return total / samples, means(sums)
