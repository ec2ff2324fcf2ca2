"""Forward passes only, in eval mode: every worker runs its stages' forwards, micro-batch by micro-batch.

Batches follow each other without a gap: while the driver collects one batch, the next ones are under way.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from rpcpipe._arguments import require_flag, require_functions, require_iterable
from rpcpipe.driver import feeding
from rpcpipe.driver.remote_batches import Following, RemoteBatches, RemoteValue
from rpcpipe.driver.result import mean_loss, merged_outputs
from rpcpipe.driver.runtime import Runtime
from rpcpipe.driver.succession import healed
from rpcpipe.errors import ArgumentError, StateError, WorkerLost, require
from rpcpipe.model.microbatch import Nest, copied
from rpcpipe.stage.context import StepContext
from rpcpipe.stage.metrics import Metrics, Sums, means
from rpcpipe.transport.interrupts import shield_interrupts
from rpcpipe.transport.user_pickling import named_dumps
from rpcpipe.worker.messages import Report
from rpcpipe.worker.operations import ReleaseCaches, SetMetrics, SetSelection

T = TypeVar("T")
METRIC = "called as metric(output, target)"


class Wanted(NamedTuple):
    """What a training step reports beside its loss: metrics on the last stage, and the outputs."""

    measures: bool = False
    outputs: bool = False

    @classmethod
    def of(cls, runtime: Runtime, metrics: Metrics | None, outputs: bool) -> Wanted:
        """Tell the last stage which ``metrics`` to compute, and return what the step is to report."""
        require_flag("outputs", outputs)
        if metrics is None:
            return cls(outputs=outputs)
        require_functions("metrics", metrics, METRIC)
        if not metrics:
            return cls(outputs=outputs)
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


@dataclass
class _Pass:
    """A batch under way, and the workers' replies once it has been issued."""

    inputs: Nest
    targets: Nest | None
    passed: Passed | None = None
    replies: Mapping[str, Future[Any]] = field(default_factory=dict)


class Passes:
    """Batches that pass through a pipeline, which takes no other step meanwhile.

    For the workers each batch is a separate step; ``ahead`` batches are fed beyond the one that is awaited. After
    a failure, and where the caller stops early, the batches under way are dropped; if a worker has died and been
    replaced they are fed again. ``keep_outputs``: the last stage keeps its outputs; targets may then be None.
    """

    def __init__(self, runtime: Runtime, *, keep_outputs: bool = False) -> None:
        self._runtime, self._keep_outputs = runtime, keep_outputs
        # As many micro-batches as there are workers fill the pipeline, and two more hide the driver's time.
        self.ahead = -(-(runtime.layout.pipeline_size + 2) // runtime.chunks)
        self._waiting: deque[_Pass] = deque()
        self._first: Mapping[str, int] = {}
        self._has_lost = False  # a worker, since the oldest batch was fed
        # Deaths since a batch was collected: one that is noticed while batches are fed counts among its batch's tries.
        self._causes: list[WorkerLost] = []

    def run(self, batches: Iterable[tuple[Nest, Nest | None]]) -> Iterator[Passed]:
        """Run every (inputs, targets), or those of RemoteBatches, and yield the results in order."""
        self._runtime.enter(self)
        self._first = self._runtime.driver.places()
        if isinstance(batches, RemoteBatches):
            batches = Following(batches, self._is_there, paired=not self._keep_outputs)
        try:
            for inputs, targets in batches:
                self._waiting.append(_Pass(copied(inputs), None if targets is None else copied(targets)))
                self._healed(self._feed)
                if len(self._waiting) > self.ahead:
                    yield self._healed(self._collect)
            while self._waiting:
                yield self._healed(self._collect)
        except BaseException:
            self._cancel()
            raise
        finally:
            self._runtime.leave(self)

    def _is_there(self, inputs: RemoteValue) -> bool:
        return self._healed(lambda: feeding.has(self._runtime, inputs))

    def _healed(self, call: Callable[[], T]) -> T:
        """Return ``call()``; made again where a worker has died, once all that is under way has been fed again."""

        def check() -> None:
            self._runtime.check()
            self._cancel()
            self._first = self._runtime.driver.places()
            self._has_lost = True
            for one in self._waiting:
                one.replies = {}

        def feed_and_call() -> T:
            self._feed()
            return call()

        return healed(self._runtime.cluster, check, feed_and_call, causes=self._causes)

    def _cancel(self) -> None:
        with shield_interrupts():
            self._runtime.driver.cancel(self._runtime.driver.new_step(), self._first)

    def apply(self) -> None:
        """Raise StateError: there is no update to apply."""
        raise StateError("batches run forward only now, there is nothing to apply; finish the iterator first")

    def forget(self) -> None:
        """Do nothing: forward passes accumulate no gradients."""

    def lose(self) -> None:
        """Do nothing: whoever waits for what was under way notices that it is gone."""

    def _feed(self) -> None:
        """Issue the batches that are not under way; after a death the oldest alone, which tells which one is fatal."""
        runtime = self._runtime
        for one in itertools.islice(self._waiting, 1 if self._has_lost else None):
            if one.replies:
                continue
            cut = feeding.cut_outputs if self._keep_outputs else feeding.cut_pair
            batch, target_parts = cut(runtime, one.inputs, one.targets)
            step = runtime.driver.new_step()
            plan = StepContext(step, runtime.trained, False, batch.weights, keep_outputs=self._keep_outputs)
            program = runtime.program.forward(batch.counts, targets=target_parts is not None)
            one.passed = Passed(batch.size.samples, batch.weights, {})
            one.replies = runtime.driver.issue(program, plan, runtime.program.given(batch.parts, target_parts))

    def _collect(self) -> Passed:
        """Return the oldest batch's results."""
        oldest = self._waiting[0]
        assert oldest.passed is not None
        reports = self._runtime.driver.collect(oldest.replies)
        self._waiting.popleft()
        self._has_lost = False
        self._causes.clear()
        return oldest.passed._replace(reports=reports)


def outputs(runtime: Runtime, batches: Iterable[Nest]) -> Generator[Nest, None, None]:
    """Yield the model's output for every batch of inputs."""
    if not isinstance(batches, RemoteBatches):
        require_iterable("batches", batches, "inputs")
    if not isinstance(batches, RemoteBatches):
        batches = ((inputs, None) for inputs in batches)
    for passed in Passes(runtime, keep_outputs=True).run(batches):
        yield passed.output


def tell_last_stage(runtime: Runtime, operation: SetMetrics | SetSelection) -> None:
    """Execute ``operation``, which holds for all later passes, on the last stage of every replica."""
    driver, workers = runtime.driver, runtime.stages[-1].workers
    runtime.healed(lambda: driver.collect({worker: driver.call(worker, operation) for worker in workers}))
    runtime.history.called(workers, operation)


def release_caches(runtime: Runtime) -> None:
    """Let all workers release the keys and values that they have kept of generation."""
    driver = runtime.driver
    workers = {worker for stage in runtime.stages for worker in stage.workers}
    runtime.healed(lambda: driver.collect({worker: driver.call(worker, ReleaseCaches()) for worker in workers}))


def evaluate(
    runtime: Runtime, batches: Iterable[tuple[Nest, Nest]], metrics: Metrics
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
    require_functions("metrics", metrics, METRIC)
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
        raise ArgumentError("evaluate needs at least one batch in which something counts, and batches has none")
    return total / samples, means(sums)
