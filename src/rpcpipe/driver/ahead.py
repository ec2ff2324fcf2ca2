"""Train with the next step issued while one runs, so that workers never wait for the driver.

    driver    issue t+1 │ result t ▶ caller ▶ orders t+1, issue t+2 │ result t+1 ▶ …
    workers   … step t ─┼─▶ forwards and backwards of t+1 ─▶ update of t+1 ─▶ forwards of t+2 …

Updates wait for the driver's orders, which it sends when the caller asks for the result: the caller's schedulers have
run by then. A step that runs ahead was issued on the assumption that the one before succeeds and that nothing changes
meanwhile. Otherwise, and before any other call, it is taken back and issued again, so the results are those of steps
that follow each other.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

from rpcpipe.driver.callbacks import tell
from rpcpipe.driver.course import Course, Cut, Issued
from rpcpipe.driver.result import StepResult
from rpcpipe.driver.runtime import Runtime
from rpcpipe.driver.step import Step, train_once
from rpcpipe.driver.stream import Stream
from rpcpipe.errors import WorkerLost, require
from rpcpipe.model.microbatch import Nest, copied
from rpcpipe.transport.interrupts import allow_interrupts


@dataclass
class _Coming:
    """The next batch, or what reading it has raised (StopIteration at the end), and its step if that runs ahead."""

    batch: tuple[Nest, Nest] | None = None
    error: Exception | None = None
    issued: Issued | None = None


def train(
    runtime: Runtime,
    batches: Iterator[tuple[Nest, Nest]],
    train_step: Callable[[Nest, Nest], StepResult],
    ahead: int,
) -> Generator[StepResult, None, None]:
    """Return the results of training on ``batches``: streamed, ``ahead`` of the caller by one step, or one by one."""
    require(not isinstance(ahead, bool) and ahead in (0, 1), f"ahead must be 0 or 1, not {ahead!r}")
    if runtime.policy is not None:
        return Stream(runtime).run(batches, runtime.settings.flush_every)
    if ahead:
        return StepsAhead(runtime, batches, train_step).run()
    return (train_step(inputs, targets) for inputs, targets in batches)


class StepsAhead:
    """Trains on ``batches``, which it reads one ahead. ``train_step`` trains on one while the schedule streams."""

    def __init__(
        self,
        runtime: Runtime,
        batches: Iterator[tuple[Nest, Nest]],
        train_step: Callable[[Nest, Nest], StepResult],
    ) -> None:
        self._runtime, self._batches, self._train_step = runtime, batches, train_step
        self._coming: _Coming | None = None

    def run(self) -> Generator[StepResult, None, None]:
        """Yield the results in order."""
        try:
            while (coming := self._coming or self._read()) is not None and coming.batch is not None:
                self._coming = None
                streams = self._runtime.policy is not None
                yield self._train_step(*coming.batch) if streams else self._step(coming.batch, coming.issued)
            assert coming is not None  # no step was under way
            assert coming.error is not None
            if not isinstance(coming.error, StopIteration):
                raise coming.error
        finally:
            if not self._runtime.closed and self._runtime.cluster.healthy:
                self._runtime.driver.take_ahead_back()

    def _step(self, batch: tuple[Nest, Nest], issued: Issued | None) -> StepResult:
        self._runtime.check()
        runtime = self._runtime

        def alone(_: Course | None) -> None:
            self._prepare(None)

        # A snapshot is taken between two steps.
        prepare = alone if runtime.history.due else self._prepare

        def step() -> StepResult:
            nonlocal prepare
            # If a worker dies, it may be the next batch that kills it: this one's step is made again alone.
            meanwhile, prepare = prepare, alone
            return train_once(Step(runtime, runtime.trained, updates_at_once=True), *batch, issued, meanwhile)

        result = runtime.healed(step)
        runtime.history.tick()
        tell(runtime.callbacks, result)
        return result

    def _prepare(self, follower: Course | None) -> None:
        """Read the next batch; issue its step if it can take the course ``follower``."""
        if self._coming is None:
            with allow_interrupts():
                self._coming = self._read()
        if self._coming is None or follower is None or (batch := self._coming.batch) is None:
            return
        try:
            cut = Cut.of(self._runtime, *batch)
        except Exception:
            return  # its own step will raise it
        self._coming.issued = Issued.ahead(self._runtime, follower, cut)

    def _read(self) -> _Coming | None:
        """Return the next batch; None if a worker died in reading it while a step is under way: it is read later."""
        try:
            inputs, targets = next(self._batches)
            # The caller may fill the same tensors with the batch after this one, before this one has been sent.
            return _Coming((copied(inputs, with_gradients=True), copied(targets)))
        except WorkerLost as error:
            if self._runtime.active is not None:
                return None  # the step will notice
            return _Coming(error=error)
        except Exception as error:
            return _Coming(error=error)
