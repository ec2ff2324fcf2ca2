"""Callbacks, which take the StepResult of every step: JSON lines and TensorBoard."""

from __future__ import annotations

import json
import math
import os
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rpcpipe._arguments import require_path
from rpcpipe.driver.result import StepResult
from rpcpipe.errors import DependencyError

Callback = Callable[[StepResult], Any]
# The figures of a record in their order. Those of streams have an empty value in a synchronous step's record, so that
# all lines of a file have the same keys.
_OF_STREAMS: dict[str, Any] = {
    "skipped": 0, "versions": (), "staleness": (), "peak_versions": (), "peak_version_bytes": (),
}  # fmt: skip
_FIGURES = (
    "step", "loss", "grad_norm", "seconds", "peak_in_flight", "applied", "peak_activation_bytes", "recomputed", "lr",
    *_OF_STREAMS, "accumulated", "samples", "tokens", "throughput", "loss_scale", "bubble", "metrics",
)  # fmt: skip


def record(result: StepResult) -> dict[str, Any]:
    """Return the figures of ``result`` by name, fit for JSON: None for NaN and infinity, lists for tuples."""
    return {name: _plain(getattr(result, name, _OF_STREAMS.get(name))) for name in _FIGURES}


def _plain(value: Any) -> Any:
    """Return ``value`` fit for JSON. The commonest kinds come first: this runs after every step."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    if not isinstance(value, int) and isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return value


class JsonLines:
    """Appends one JSON object per step to ``path``: StepResult's figures and ``time``, seconds since 1970.

    Every line is written by one call as soon as its step is done, so a kill loses at most the last line; the
    torn rest of that line is cut off when the file is opened again. Lines are never removed: after a resume
    a step number may appear twice, and the later line counts.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = require_path("path", path)
        self._file = self.path.open("ab", buffering=0)
        _cut_torn_line(self.path)

    def __call__(self, result: StepResult) -> None:
        """Write the record of ``result``, or nothing of it: a torn line would be glued to the next record."""
        rest = memoryview(json.dumps({**record(result), "time": time.time()}).encode() + b"\n")
        size = len(rest)
        try:
            while rest:  # a disk that is nearly full, or a signal, may take only a part
                rest = rest[self._file.write(rest) or 0 :]
        except BaseException:
            if len(rest) < size and stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                self._file.truncate(self._file.tell() - size + len(rest))
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __repr__(self) -> str:
        return f"JsonLines({str(self.path)!r})"


def _cut_torn_line(path: Path) -> None:
    """Truncate the file after its last newline."""
    size, block = path.stat().st_size, 1 << 16
    with path.open("r+b") as file:
        end = size
        while end > 0:
            start = max(0, end - block)
            file.seek(start)
            if (newline := file.read(end - start).rfind(b"\n")) >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            file.truncate(end)


class TensorBoard:
    """Writes every step's figures as scalars to ``directory``, from which TensorBoard reads them.

    Figures of several stages or parameter groups are named by index: ``peak_in_flight/0``. After a resume
    TensorBoard hides older scalars of the first step that is written again and of all later steps.
    Raises DependencyError where the extra ``track`` is not installed.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise DependencyError(
                "rp.callbacks.TensorBoard needs tensorboard: pip install '.[track]' in a checkout"
            ) from error
        self.directory = require_path("directory", directory)
        self._make: Any = SummaryWriter
        self._writer: Any = None

    def __call__(self, result: StepResult) -> None:
        if self._writer is None:
            self._writer = self._make(str(self.directory), purge_step=result.step)
        for name, value in record(result).items():
            if name != "step":
                self._write(name, value, result.step)

    def _write(self, name: str, value: Any, step: int) -> None:
        if isinstance(value, (Sequence, Mapping)):
            for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
                self._write(f"{name}/{key}", part, step)
        elif value is not None:
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write all pending scalars and close the file."""
        if self._writer is not None:
            self._writer.close()

    def __repr__(self) -> str:
        return f"TensorBoard({str(self.directory)!r})"


def tell(callbacks: Sequence[Callback], result: StepResult) -> None:
    """Call every callback with ``result``; then raise the first exception, with a note that the step is done."""
    first: Exception | None = None
    for callback in callbacks:
        try:
            callback(result)
        except Exception as error:
            error.add_note(
                f"raised by the callback {callback!r} after step {result.step}, which is done and counted;"
                " the pipeline is usable, `pipe.callbacks` holds its callbacks"
            )
            if first is not None:
                first.add_note(f"and {callback!r} raised {error!r}")
            first = first or error
    if first is not None:
        raise first
