"""Everything rpcpipe raises, as one tree.

    RpcPipeError
    ├── ArgumentError      (also ValueError)    a value that a call does not take
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

import functools
import math
import numbers
import pickle
import sys
import traceback
from dataclasses import dataclass
from typing import Any


class RpcPipeError(Exception):
    """Base of all errors of rpcpipe."""


class ArgumentError(RpcPipeError, ValueError):
    """An argument has a value that a call does not take."""


class ScheduleError(RpcPipeError, ValueError):
    """A schedule is undefined for these sizes, or cannot run."""


class PartitionError(RpcPipeError, ValueError):
    """The model cannot be cut as asked."""


class RendezvousError(RpcPipeError):
    """The driver and its workers did not come together."""


class CheckpointError(RpcPipeError):
    """Saved state does not fit this model, or cannot be read."""


class WorkerLost(RpcPipeError):
    """A worker process died or stopped answering; the cluster must be launched again.

    ``worker`` is its name, ``stages`` what it held, ``host`` and ``pid`` where it was.
    """

    def __init__(
        self, message: str, *, worker: str = "", stages: tuple[int, ...] = (), host: str = "", pid: int = 0
    ) -> None:
        super().__init__(message)
        self.worker, self.stages, self.host, self.pid = worker, stages, host, pid

    def again(self) -> WorkerLost:
        """A copy to raise: an exception raised twice would gather both tracebacks."""
        return WorkerLost(str(self), worker=self.worker, stages=self.stages, host=self.host, pid=self.pid)


class DeadlineExceeded(RpcPipeError, TimeoutError):
    """No action finished for as long as the cluster's ``timeout`` allows."""


_AFTER_A_STEP = (
    "The step was cancelled, no weight has changed and the pipeline is usable; mend the cause and call again."
)
_AFTER_A_CALL = "The worker is alive; mend the cause and call again."


# What of a message, a traceback and a pickled exception travels.
_LONGEST_MESSAGE = 10_000
_LONGEST_TRACEBACK = 20_000
_LONGEST_PICKLE = 1 << 20

# Mixed into the error that is raised at the driver they would mean something else there: they end
# a generator, a coroutine.
_UNMIXABLE = (StopIteration, StopAsyncIteration)


@dataclass(frozen=True)
class Failure:
    """What went wrong on a worker, in strings and bytes only, so that it always travels.

    torch RPC rebuilds a remote exception as ``type(message)``, which loses two-argument
    constructors, local classes and non-ASCII text; a Failure is sent as a value instead.
    """

    worker: str
    stage: int | None
    chunk: int | None
    action: str
    module: str
    qualname: str
    message: str
    traceback: str
    pickled: bytes | None = None
    in_step: bool = False
    cancelled: bool = False
    after: str = ""  # what the weights are now, where it is not what _AFTER_A_STEP says

    @property
    def type_name(self) -> str:
        return self.qualname if self.module == "builtins" else f"{self.module}.{self.qualname}"

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
        message, text = _words(error)
        kind = type(error)
        return cls(
            worker, stage, chunk, action, kind.__module__, kind.__qualname__, message, text, _pickled(error), in_step
        )

    @classmethod
    def stated(cls, kind: type[Exception], message: str, *, worker: str, stage: int) -> Failure:
        """A failure of ``stage`` that is seen in what it reported."""
        return cls(worker, stage, None, "backward", kind.__module__, kind.__qualname__, message, "", in_step=True)

    @classmethod
    def cancel(cls, worker: str, action: str) -> Failure:
        """The outcome of a call whose step another stage has failed."""
        return cls(worker, None, None, action, "builtins", "Cancelled", "the step was cancelled", "", cancelled=True)


def _words(error: BaseException) -> tuple[str, str]:
    """Message and traceback; of huge ones the parts that matter."""
    try:
        message = str(error)
        text = "".join(traceback.format_exception(error))
    except Exception as broken:
        message = f"<its str() raised {type(broken).__name__}>"
        text = "".join(traceback.format_tb(error.__traceback__))
    if len(message) > _LONGEST_MESSAGE:
        message = f"{message[:_LONGEST_MESSAGE]} … ({len(message):,} characters in all)"
    if len(text) > _LONGEST_TRACEBACK:
        half = _LONGEST_TRACEBACK // 2
        text = f"{text[:half]}\n … {len(text) - 2 * half:,} characters left out …\n{text[-half:]}"
    return message, text


def _pickled(error: BaseException) -> bytes | None:
    try:
        data = pickle.dumps(error)
    except Exception:
        return None
    return data if len(data) <= _LONGEST_PICKLE else None


class StageError(RpcPipeError):
    """The user's code raised on a worker; the step was cancelled and no weight changed.

    Where the original's type is known here too, the error is of that type as well, so that ``except
    ValueError`` works. ``stage``, ``chunk`` and ``action`` say where, ``remote_traceback`` how,
    ``original`` is the exception itself where it could be sent.
    """

    def __init__(self, failure: Failure) -> None:
        where = f"{failure.action} on {failure.worker}"
        if failure.stage is not None:
            chunk = "" if failure.chunk is None else f", micro-batch {failure.chunk}"
            where = f"{failure.action} of stage {failure.stage}{chunk} on {failure.worker}"
        # Past the original type's own __init__, whose arguments are not ours.
        BaseException.__init__(
            self,
            f"{where} raised {failure.type_name}: {failure.message}\n"
            f"{failure.after or (_AFTER_A_STEP if failure.in_step else _AFTER_A_CALL)}\n"
            f"--- traceback on {failure.worker} ---\n{failure.traceback.rstrip()}",
        )
        self.failure = failure
        self.stage = failure.stage
        self.chunk = failure.chunk
        self.action = failure.action
        self.remote_traceback = failure.traceback

    def __str__(self) -> str:
        return str(self.args[0])

    def __reduce__(self) -> tuple[Any, tuple[Failure]]:
        return StageError.of, (self.failure,)

    @property
    def original(self) -> BaseException | None:
        """The exception as the worker had it, without its traceback; None if it could not be sent."""
        try:
            found = pickle.loads(self.failure.pickled) if self.failure.pickled else None
        except Exception:
            return None
        return found if isinstance(found, BaseException) else None

    @staticmethod
    def of(failure: Failure) -> StageError:
        """The error to raise: of the original's type too, where that is known in this process."""
        kind = _known_type(failure)
        if kind is not None:
            try:
                return _mixed(kind)(failure)  # type: ignore[arg-type]
            except Exception:
                pass  # a type that does not mix, or whose __new__ wants its own arguments
        return StageError(failure)


def _known_type(failure: Failure) -> type[Exception] | None:
    """Looked up, not imported: who wants to catch a type has imported it."""
    found: Any = sys.modules.get(failure.module)
    for name in failure.qualname.split("."):
        found = getattr(found, name, None)
    if not isinstance(found, type) or not issubclass(found, Exception):
        return None  # SystemExit and KeyboardInterrupt of a worker must not end the driver
    return None if issubclass(found, (StageError, *_UNMIXABLE)) else found


@functools.cache
def _mixed(kind: type[Exception]) -> type[StageError]:
    return type("StageError", (StageError, kind), {"__module__": __name__, "__doc__": StageError.__doc__})


def require(condition: bool, message: str) -> None:
    """Raise ArgumentError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ArgumentError(message)


def require_whole(name: str, value: Any, least: float = 1, otherwise: str = "") -> int:
    """Return argument ``name`` as an int; raises ArgumentError unless it is a whole number of at least ``least``.

    ``otherwise``: what the message says is allowed beside it.
    """
    bound = "" if least == -math.inf else f" of at least {least}"
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise ArgumentError(f"{name} must be a whole number{bound}{otherwise}, not {value!r}")
    whole = int(value)
    require(whole >= least, f"{name} must be at least {least}{otherwise}, not {whole}")
    return whole


def require_positive(name: str, value: Any, otherwise: str = "") -> float:
    """Return argument ``name`` as a float; raises ArgumentError unless it is a number above 0."""
    number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else 0.0
    require(number > 0, f"{name} must be a number above 0{otherwise}, not {value!r}")
    return number
