"""Calls of the user's functions on stages between steps (``pipe.stages[k].call``), on workers that may die."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

from rpcpipe.cluster.tenancy import PipelineCluster
from rpcpipe.driver.driver import Driver
from rpcpipe.driver.replies import raise_failure, raise_loss
from rpcpipe.driver.roles import Active, Past
from rpcpipe.driver.settings import Settings
from rpcpipe.driver.succession import healed
from rpcpipe.driver.torn import Torn
from rpcpipe.errors import Failure, WorkerLost
from rpcpipe.worker.operations import BeginCall, CallModule, RollBackStep


class Host(Protocol):
    """The pipeline whose stages are called."""

    cluster: PipelineCluster
    driver: Driver
    history: Past
    settings: Settings
    torn: Torn

    @property
    def active(self) -> Active | None: ...

    def ready(self) -> None: ...

    def mend(self) -> None: ...

    def go_back(self) -> None: ...


def execute(host: Host, workers: Sequence[str], operation: CallModule) -> dict[str, Any]:
    """Execute ``operation`` on each of ``workers`` once, and return the results.

    On a worker that dies in it what it has changed is undone, and it is executed again. Inside an open step it is
    not: the step is lost, too. Without copies it is not either: what has been changed is not known.
    """
    driver, number, done = host.driver, host.driver.new_step(), dict[str, Any]()
    restored = host.history.restored
    heals = host.cluster.heal > 0 and host.active is None
    keep = heals and host.settings.undo == "copy"

    def rest() -> dict[str, Any]:
        replies = {
            worker: driver.call(worker, operation, before=BeginCall(number) if keep else None)
            for worker in workers
            if worker not in done
        }
        outcomes = driver.outcomes(replies)
        lost = {worker: outcome for worker, outcome in outcomes.items() if isinstance(outcome, WorkerLost)}
        done.update((worker, outcome) for worker, outcome in outcomes.items() if worker not in lost)
        if any(isinstance(outcome, Failure) for outcome in done.values()):
            undo(lost)
            raise_failure(done.values())
        raise_loss(lost.values())
        return done

    def undo(on: Iterable[str]) -> None:
        driver.ensure([RollBackStep(number, updating=True)], on)

    def check() -> None:
        nonlocal restored
        host.ready()
        if host.history.restored > restored:
            restored = host.history.restored
            done.clear()
        undo(worker for worker in workers if worker not in done)

    if not keep:
        with _or_torn(host) if heals else nullcontext():
            results = rest()
    else:
        results = _undone(lambda: healed(host.cluster, check, rest), lambda: undo(workers))
    if heals:
        host.history.called(workers, operation)
    return results


def _undone(call: Callable[[], dict[str, Any]], undo: Callable[[], None]) -> dict[str, Any]:
    """Return ``call()``; ``undo()`` where it is given up."""
    try:
        return call()
    except WorkerLost:
        undo()
        raise


@contextmanager
def _or_torn(host: Host) -> Iterator[None]:
    """Where a worker dies in the block, which may change weights without a copy of them, say what is left."""
    try:
        yield
    except WorkerLost as lost:
        host.mend()
        if host.history.leads_to_now:
            host.go_back()
            raise
        host.history.cut()
        raise WorkerLost(host.torn.tear(f"{lost}. It died in a call that may have changed its stages.")) from lost
