"""Everything rpcpipe raises, as one tree.

    RpcPipeError
    ├── ScheduleError      (also ValueError)    a schedule that cannot run
    ├── PartitionError     (also ValueError)    a cut of the model that cannot be made
    ├── RendezvousError                         processes that do not come together
    ├── CheckpointError                         saved state that cannot be read or applied
    ├── WorkerLost                              a worker process died or stopped answering
    ├── DeadlineExceeded   (also TimeoutError)  nothing moved for as long as the caller allowed
    └── StageError                              the user's code raised on a worker

Every message says what happened, with the values, and what to do next.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass


class RpcPipeError(Exception):
    """Base of all errors of rpcpipe."""


class ScheduleError(RpcPipeError, ValueError):
    """A schedule is undefined for these sizes, or cannot run."""


class PartitionError(RpcPipeError, ValueError):
    """The model cannot be cut as asked."""


class RendezvousError(RpcPipeError):
    """The driver and its workers did not come together."""


class CheckpointError(RpcPipeError):
    """Saved state does not fit this model, or cannot be read."""


class WorkerLost(RpcPipeError):
    """A worker process died or stopped answering; the cluster must be launched again."""

    def __init__(self, message: str, *, worker: str = "") -> None:
        super().__init__(message)
        self.worker = worker


class DeadlineExceeded(RpcPipeError, TimeoutError):
    """No action finished for as long as the cluster's ``timeout`` allows."""


_AFTER_A_STEP = (
    "The step was cancelled, no weight has changed and the pipeline is usable; mend the cause and call again."
)
_AFTER_A_CALL = "The worker is alive; mend the cause and call again."


@dataclass(frozen=True)
class Failure:
    """What went wrong on a worker, in strings only, so that it always travels.

    torch RPC rebuilds a remote exception as ``type(message)``, which loses two-argument
    constructors, local classes and non-ASCII text; a Failure is sent as a value instead.
    """

    worker: str
    stage: int | None
    chunk: int | None
    action: str
    type_name: str
    message: str
    traceback: str
    in_step: bool = False
    cancelled: bool = False

    @classmethod
    def of(
        cls,
        error: BaseException,
        *,
        worker: str,
        action: str,
        stage: int | None = None,
        chunk: int | None = None,
        in_step: bool = False,
    ) -> Failure:
        """Describe ``error``, which is being handled, without ever raising itself."""
        try:
            message = str(error)
        except Exception as broken:
            message = f"<its str() raised {type(broken).__name__}>"
        text = "".join(traceback.format_exception(error))
        kind = type(error)
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        return cls(worker, stage, chunk, action, name, message, text, in_step)

    @classmethod
    def cancel(cls, worker: str, action: str) -> Failure:
        """The outcome of a call whose step another stage has failed."""
        return cls(worker, None, None, action, "Cancelled", "the step was cancelled", "", cancelled=True)


class StageError(RpcPipeError):
    """The user's code raised on a worker; the step was cancelled and no weight changed."""

    def __init__(self, failure: Failure) -> None:
        where = f"{failure.action} on {failure.worker}"
        if failure.stage is not None:
            chunk = "" if failure.chunk is None else f", micro-batch {failure.chunk}"
            where = f"{failure.action} of stage {failure.stage}{chunk} on {failure.worker}"
        super().__init__(
            f"{where} raised {failure.type_name}: {failure.message}\n"
            f"{_AFTER_A_STEP if failure.in_step else _AFTER_A_CALL}\n"
            f"--- traceback on {failure.worker} ---\n{failure.traceback.rstrip()}"
        )
        self.failure = failure
        self.stage = failure.stage
        self.chunk = failure.chunk
        self.action = failure.action
        self.remote_traceback = failure.traceback

    def __reduce__(self) -> tuple[type[StageError], tuple[Failure]]:
        return type(self), (self.failure,)
