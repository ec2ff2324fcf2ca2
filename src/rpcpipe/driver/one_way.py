"""Updates that cannot be taken back (``undo="off"``): what has become of one that has failed.

The driver sends such an update once all stages are done and all gradients are finite. If an optimizer raises in it or a
worker dies in it, some stages may have applied it and some not. Then every worker, or its successor, is asked:

    nobody has begun        ─▶ the step is as if it had not been: raised, or made again where a worker has died
    all have ended it       ─▶ it has succeeded, although a worker died before it could say so
    anything else: torn     ─▶ all go back to the newest snapshot where there is one; else the pipeline refuses to go on
                               until what is torn has been replaced
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rpcpipe.driver.replies import raise_loss
from rpcpipe.driver.runtime import Runtime
from rpcpipe.driver.succession import healed
from rpcpipe.errors import DeadlineExceeded, ModelError, RpcPipeError, StageError, WorkerLost
from rpcpipe.stage.rollback import Reach
from rpcpipe.transport.interrupts import hold_interrupts
from rpcpipe.worker.operations import RollBackStep

# By worker; None where it is not known.
Reached = Mapping[str, Reach | None]


@contextmanager
def one_way(runtime: Runtime, step: int) -> Iterator[None]:
    """Let the block apply the update of ``step``, which began as the message ``step``, on all workers.

    No Ctrl-C ends it. An error of the block is raised with what has become of the update, or not at all if all workers
    have applied it.
    """
    with hold_interrupts():
        try:
            yield
        except Exception as error:
            told = _told(runtime, step, error)
            if told is error:
                raise
            if told is not None:
                # A loss with a loss as its cause is not healed.
                raise told from (error if isinstance(error, WorkerLost) else None)


def _told(runtime: Runtime, step: int, error: Exception) -> Exception | None:
    """Return what to raise for ``error``, which the update of ``step`` has met with; None if it has succeeded."""
    reached = _reached(runtime, step, error)
    if all(reach is Reach.BEFORE for reach in reached.values()):
        runtime.driver.ensure([RollBackStep(step, updating=False)])
        return error
    if all(reach is Reach.AFTER for reach in reached.values()) and isinstance(error, WorkerLost):
        return None
    account = _account(runtime, reached)
    if runtime.history.leads_to_now:
        runtime.go_back()
        after = f"{account} All workers went back to the newest snapshot: no weight has changed."
        return error if isinstance(error, WorkerLost) else _with(error, after)
    runtime.history.cut()
    return _with(error, runtime.torn.tear(account))


def _reached(runtime: Runtime, step: int, error: Exception) -> Reached:
    """Return how far every worker is that updates anything, once what has not begun is dropped."""
    driver, heals = runtime.driver, runtime.cluster.heal > 0

    def ask() -> dict[str, Any]:
        outcomes = driver.reaches(step)
        if heals:
            raise_loss(outcomes.values())
        return outcomes

    if isinstance(error, DeadlineExceeded):  # whoever did not answer will not answer now
        return dict.fromkeys(runtime.names)
    try:
        if heals:
            runtime.mend()
            outcomes = healed(runtime.cluster, runtime.mend, ask)
        else:
            outcomes = ask()
    except (WorkerLost, DeadlineExceeded):
        return dict.fromkeys(runtime.names)
    known = {name: outcome if isinstance(outcome, Reach) else None for name, outcome in outcomes.items()}
    return {name: reach for name, reach in known.items() if reach is not None or outcomes[name] is not None}


def _account(runtime: Runtime, reached: Reached) -> str:
    """Say which stages have applied the update and which have not."""
    words = {
        Reach.AFTER: "applied on",
        Reach.WITHIN: "begun and not ended on",
        Reach.BEFORE: "not begun on",
        None: "not known of",
    }
    found = []
    for reach, what in words.items():
        names = [name for name, its in reached.items() if its is reach]
        stages = sorted({stage for name in names for stage in runtime.stages_on(name)})
        if names:
            several = "s" * (len(stages) != 1)
            found.append(f"{what} stage{several} {', '.join(map(str, stages))} ({', '.join(names)})")
    return f"The update of step {runtime.trained} failed half way: it is {'; '.join(found)}."


def _with(error: Exception, after: str) -> Exception:
    """Return ``error``, which says what holds ``after`` it."""
    if isinstance(error, StageError):
        return StageError.of(dataclasses.replace(error.failure, after=after))
    if isinstance(error, WorkerLost):
        return WorkerLost(
            f"{error}\n{after}", worker=error.worker, stages=error.stages, host=error.host, pid=error.pid
        )  # fmt: skip
    if isinstance(error, (DeadlineExceeded, ModelError)):
        return type(error)(f"{error}\n{after}")
    return RpcPipeError(f"{error}\n{after}")
