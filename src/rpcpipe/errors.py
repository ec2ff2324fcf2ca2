"""Define every error that rpcpipe raises, as one tree.

    RpcPipeError
    ├── ArgumentError    (also ValueError)          a value that a call does not take
    ├── ModelError       (also ValueError)          a layer, loss or optimizer that a pipeline would train differently
    ├── ScheduleError    (also ValueError)          a schedule that cannot run, or does not fit model and settings
    ├── PartitionError   (also ValueError)          a cut of the model that cannot be made
    ├── StateError       (also RuntimeError)        a call that does not fit what was made, or what is under way
    ├── CheckpointError                             state that cannot be saved, read or applied
    ├── RendezvousError                             processes that do not come together
    ├── WorkerLost                                  a worker process died or stopped answering
    ├── DeadlineExceeded (also TimeoutError)        nothing moved for as long as the caller allowed
    ├── NonFiniteError   (also FloatingPointError)  a loss or gradient that is not finite, with nonfinite="stop"
    ├── DependencyError  (also ImportError)         a package that an extra installs is missing
    └── StageError                                  raised on a worker; also of the type that was raised there

Every message says what happened, with the values, and what to do next. A condition has one type wherever it is noticed:
found on a worker, it is a StageError that is also of that type.
"""

from __future__ import annotations

import functools
import math
import numbers
import os
import pickle
import sys
import traceback
from dataclasses import dataclass
from typing import Any

import cloudpickle


class RpcPipeError(Exception):
    """Base of all errors of rpcpipe."""


class ArgumentError(RpcPipeError, ValueError):
    """An argument has a value that a call does not take."""


class ModelError(RpcPipeError, ValueError):
    """A layer, loss or optimizer is or does what a pipeline cannot train as one process would."""


class ScheduleError(RpcPipeError, ValueError):
    """A schedule is undefined for these sizes, cannot run, or does not fit the model and the settings."""


class PartitionError(RpcPipeError, ValueError):
    """The model cannot be cut as asked."""


class StateError(RpcPipeError, RuntimeError):
    """A call does not fit how the pipeline or cluster was made, or what it does now."""


class RendezvousError(RpcPipeError):
    """The driver and its workers did not come together."""


class CheckpointError(RpcPipeError):
    """State does not fit this model, or cannot be saved or read."""


class WorkerLost(RpcPipeError):
    """A worker process died or stopped answering; the cluster must be launched again.

    ``worker`` is its name, ``stages`` the stages that it held, ``host`` and ``pid`` say where it ran.
    """

    def __init__(
        self, message: str, *, worker: str = "", stages: tuple[int, ...] = (), host: str = "", pid: int = 0
    ) -> None:
        super().__init__(message)
        self.worker, self.stages, self.host, self.pid = worker, stages, host, pid

    def again(self) -> WorkerLost:
        """Return a copy to raise; an exception that is raised twice would collect both tracebacks."""
        return WorkerLost(str(self), worker=self.worker, stages=self.stages, host=self.host, pid=self.pid)


class DeadlineExceeded(RpcPipeError, TimeoutError):
    """No action finished for as long as the cluster's ``timeout`` allows."""


class NonFiniteError(RpcPipeError, FloatingPointError):
    """A loss or gradient is not finite, and ``nonfinite="stop"`` asks for an error."""


class DependencyError(RpcPipeError, ImportError):
    """A package that one of rpcpipe's extras installs is missing."""


_AFTER_A_STEP = (
    "The step was cancelled, no weight has changed and the pipeline is usable; mend the cause and call again."
)
_AFTER_A_CALL = "The worker is alive; mend the cause and call again."

# At most so much of a message and of a traceback (characters), and of a pickled exception (bytes), is sent.
_LONGEST_MESSAGE = 10_000
_LONGEST_TRACEBACK = 20_000
_PACKAGE = os.path.join(os.path.dirname(__file__), "")
_LONGEST_PICKLE = 1 << 20

# StageError does not inherit from these: where the driver raises it, they would end a generator or a coroutine.
_UNMIXABLE = (StopIteration, StopAsyncIteration)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Describes what went wrong on a worker, in strings and bytes alone, so that it can always be sent.

    torch RPC rebuilds a remote exception as ``type(message)``, which fails for constructors of two arguments, local
    classes and non-ASCII text. A Failure is therefore sent as a value.

    ``stage`` and ``chunk`` are None outside of an action, ``pickled`` is None where the exception cannot be pickled.
    ``in_step``: the failure has cancelled a step. ``cancelled``: the call did not run, because its step had failed.
    """

    worker: str
    stage: int | None = None
    chunk: int | None = None
    action: str
    module: str
    qualname: str
    message: str
    traceback: str = ""
    pickled: bytes | None = None
    in_step: bool = False
    cancelled: bool = False
    kind: bytes | None = None
    after: str = ""  # says what the weights are now, where _AFTER_A_STEP and _AFTER_A_CALL are not true

    @property
    def type_name(self) -> str:
        """Return the name of the exception's type, with its module unless it is a builtin."""
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
        """Return the Failure that describes ``error``; raises nothing, whatever ``error`` does when it is printed."""
        message, text = _message_and_traceback(error)
        kind = type(error)
        return cls(
            worker=worker,
            stage=stage,
            chunk=chunk,
            action=action,
            module=kind.__module__,
            qualname=kind.__qualname__,
            message=message,
            traceback=text,
            pickled=_pickled(error),
            in_step=in_step,
            kind=_kind(error),
        )

    @classmethod
    def stated(cls, kind: type[Exception], message: str, *, worker: str, stage: int) -> Failure:
        """Return a failure of ``stage`` that the driver found in the stage's report: there is no traceback."""
        return cls(
            worker=worker,
            stage=stage,
            action="backward",
            module=kind.__module__,
            qualname=kind.__qualname__,
            message=message,
            in_step=True,
        )

    @classmethod
    def cancel(cls, worker: str, action: str) -> Failure:
        """Return the outcome of a call that did not run, because another stage failed the step."""
        return cls(
            worker=worker,
            action=action,
            module="builtins",
            qualname="Cancelled",
            message="the step was cancelled",
            cancelled=True,
        )


def _message_and_traceback(error: BaseException) -> tuple[str, str]:
    """Return (message, traceback); a long message is cut at its end, a long traceback in its middle."""
    try:
        message = str(error)
        text = _text(error)
    except Exception as broken:
        message = f"<its str() raised {type(broken).__name__}>"
        text = "".join(traceback.format_tb(error.__traceback__))
    if len(message) > _LONGEST_MESSAGE:
        message = f"{message[:_LONGEST_MESSAGE]} … ({len(message):,} characters in all)"
    if len(text) > _LONGEST_TRACEBACK:
        half = _LONGEST_TRACEBACK // 2
        text = f"{text[:half]}\n … {len(text) - 2 * half:,} characters left out …\n{text[-half:]}"
    return message, text


def _text(error: BaseException) -> str:
    """Return the traceback as text; "" for a check of rpcpipe in whose way was nothing of the user's."""
    trace = traceback.TracebackException.from_exception(error)
    checked = isinstance(error, RpcPipeError) and error.__cause__ is None and error.__context__ is None
    return "" if checked and all(map(_leads_to_the_user, trace.stack)) else "".join(_trimmed(trace).format())


def _trimmed(trace: traceback.TracebackException) -> traceback.TracebackException:
    """Return ``trace`` without the frames through which rpcpipe and torch came to the user's code.

    What rpcpipe itself raises keeps all of its frames.
    """
    frames = list(trace.stack)
    if frames and not frames[-1].filename.startswith(_PACKAGE):
        start = next(index for index, frame in enumerate(frames) if not _leads_to_the_user(frame))
        trace.stack = traceback.StackSummary.from_list(frames[start:])
    return trace


def _leads_to_the_user(frame: traceback.FrameSummary) -> bool:
    return frame.filename.startswith(_PACKAGE) or frame.name in ("_wrapped_call_impl", "_call_impl")


def _named(module: str, qualname: str) -> Any:
    """Return the value of that name in a module that is imported; None if there is none."""
    found: Any = sys.modules.get(module)
    for name in qualname.split("."):
        found = getattr(found, name, None)
    return found


def _kind(error: BaseException) -> bytes | None:
    """Return the class pickled if it has no name to find it by: one of a script, or of a function.

    cloudpickle gives such a class back as the process has it that first sent it.
    """
    kind = type(error)
    return None if _named(kind.__module__, kind.__qualname__) is kind else _pickled(kind)


def _pickled(error: Any) -> bytes | None:
    """Return an exception or its class pickled; None if that fails or is longer than ``_LONGEST_PICKLE``."""
    try:
        data = cloudpickle.dumps(error)
    except Exception:
        return None
    return data if len(data) <= _LONGEST_PICKLE else None


class StageError(RpcPipeError):
    """The user's code, or a check of rpcpipe, raised on a worker; the step was cancelled and no weight changed.

    Where this process knows the original exception's type, the error is also of that type, so that ``except
    ValueError`` works. ``stage``, ``chunk`` and ``action`` say where it was raised, ``remote_traceback`` is the
    worker's traceback from the user's first frame on ("" for a check of rpcpipe that no code of the user's leads to),
    and ``original`` the exception itself, where it could be sent.
    """

    def __init__(self, failure: Failure) -> None:
        where = f"{failure.action} on {failure.worker}"
        if failure.stage is not None:
            chunk = "" if failure.chunk is None else f", micro-batch {failure.chunk}"
            where = f"{failure.action} of stage {failure.stage}{chunk} on {failure.worker}"
        # Not super().__init__: a mixed-in type's constructor may want other arguments.
        BaseException.__init__(
            self,
            f"{where} raised {failure.type_name}: {failure.message}\n"
            f"{failure.after or (_AFTER_A_STEP if failure.in_step else _AFTER_A_CALL)}"
            + (f"\n--- traceback on {failure.worker} ---\n{failure.traceback.rstrip()}" if failure.traceback else ""),
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
        """Return the worker's exception, without its traceback; None if it could not be sent."""
        try:
            exception = pickle.loads(self.failure.pickled) if self.failure.pickled else None
        except Exception:
            return None
        return exception if isinstance(exception, BaseException) else None

    @staticmethod
    def of(failure: Failure) -> StageError:
        """Return the error to raise for ``failure``, of the original's type too where this process knows that type."""
        try:
            if (kind := _known_type(failure)) is not None:
                return _mixed(kind)(failure)  # type: ignore[arg-type]
        except Exception:
            pass  # it cannot be unpickled, its layout conflicts with StageError's, or its __new__ wants other arguments
        return StageError(failure)


def _known_type(failure: Failure) -> type[Exception] | None:
    """Return the original exception's type; None if it is not imported here, or StageError cannot inherit from it.

    Nothing is imported: code that catches a type has imported it already.
    """
    kind = pickle.loads(failure.kind) if failure.kind else _named(failure.module, failure.qualname)
    if not isinstance(kind, type) or not issubclass(kind, Exception):
        return None  # a worker's SystemExit or KeyboardInterrupt must not end the driver
    return None if issubclass(kind, (StageError, *_UNMIXABLE)) else kind


@functools.cache
def _mixed(kind: type[Exception]) -> type[StageError]:
    """Return a class that inherits from StageError and ``kind``; the same class every time."""
    return type("StageError", (StageError, kind), {"__module__": __name__, "__doc__": StageError.__doc__})


def require(condition: bool, message: str, *, error: type[RpcPipeError] = ArgumentError) -> None:
    """Raise ``error`` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise error(message)


def require_whole(name: str, value: Any, least: float = 1, otherwise: str = "") -> int:
    """Return argument ``name`` as an int; raises ArgumentError unless it is a whole number of at least ``least``.

    ``otherwise``: what the message says is allowed beside it.
    """
    bound = "" if least == -math.inf else f" of at least {least}"
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise ArgumentError(f"{name} must be a whole number{bound}{otherwise}, not {shown(value)}")
    whole = int(value)
    require(whole >= least, f"{name} must be at least {least}{otherwise}, not {whole}")
    return whole


def require_positive(name: str, value: Any, otherwise: str = "", *, finite: bool = False) -> float:
    """Return argument ``name`` as a float; raises ArgumentError unless it is a number above 0, and ``finite`` if so."""
    number = real(value)
    require(
        number is not None and number > 0 and not (finite and math.isinf(number)),
        f"{name} must be a {'finite ' * finite}number above 0{otherwise}, not {shown(value)}",
    )
    return number or 0.0


def real(value: Any) -> float | None:
    """Return ``value`` as a float; None unless it is a number, and no bool."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if bool(value > 0) else -math.inf  # type: ignore[operator]


def shown(value: Any) -> str:
    """Return ``value`` for a message, or its type where that is long, has several lines or cannot be printed."""
    try:
        text = repr(value)
    except Exception:
        text = ""
    return text if 0 < len(text) <= 200 and "\n" not in text else f"a {type(value).__name__}"
