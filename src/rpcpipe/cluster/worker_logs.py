"""Show what workers print, prefixed and folded; keep their last lines, and a file for each.

Many workers print the same (a warning, once each) and one worker may print the same many times; the first
line is shown at once, its repetitions of the next second as one line with their number.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

_FOLD_SECONDS = 1.0
_KEPT = 20
_SHOWN = 10
_LONGEST = 1 << 16


class Lines:
    """Splits bytes into lines. A line that a progress bar has rewritten counts in its last state."""

    def __init__(self) -> None:
        self._incomplete = b""

    def feed(self, data: bytes) -> list[str]:
        """Return the lines that ``data`` completes; longer ones than 64 KiB are cut."""
        *lines, self._incomplete = (self._incomplete + data).split(b"\n")
        while len(self._incomplete) > _LONGEST:
            lines.append(self._incomplete[:_LONGEST])
            self._incomplete = self._incomplete[_LONGEST:]
        return [_plain(line) for line in lines]

    def end(self) -> list[str]:
        """Return what is left without a newline."""
        last, self._incomplete = self._incomplete, b""
        return [_plain(last)] if last else []


def _plain(line: bytes) -> str:
    return line.decode("utf-8", "replace").rstrip("\r").rpartition("\r")[2]


@dataclass
class _Fold:
    """The repetitions of a line since it was shown; ``until``: monotonic seconds."""

    stream: str
    until: float
    workers: list[str] = field(default_factory=list)


class WorkerLogs:
    """Shows the output of all workers. ``label(worker)`` is the prefix; ``directory`` gets a file per worker."""

    def __init__(self, directory: Path | None = None) -> None:
        self.label: Callable[[str], str] = lambda worker: f"[{worker}]"
        self._directory = directory
        self._files: dict[str, IO[str]] = {}
        self._tails: dict[str, deque[str]] = {}
        self._folds: dict[str, _Fold] = {}
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)

    def feed(self, worker: str, stream: str, line: str, now: float) -> None:
        """Take ``line``, which ``worker`` printed on ``stream``, "out" or "err", at ``now`` (monotonic seconds)."""
        self._tails.setdefault(worker, deque(maxlen=_KEPT)).append(line)
        self._file(worker, line)
        self.flush(now)
        fold = self._folds.get(line)
        if fold is not None:
            fold.workers.append(worker)
            return
        if line.strip():
            self._folds[line] = _Fold(stream, now + _FOLD_SECONDS)
        _show(stream, f"{self.label(worker)} {line}")

    def flush(self, now: float) -> None:
        """Show the repetitions whose second is over at ``now`` (monotonic seconds)."""
        for line in [line for line, fold in self._folds.items() if fold.until <= now]:
            fold = self._folds.pop(line)
            if fold.workers:
                labels = ", ".join(self.label(worker) for worker in dict.fromkeys(fold.workers))
                times = "once more" if len(fold.workers) == 1 else f"{len(fold.workers)} more times"
                _show(fold.stream, f"{labels} ({times}) {line}")

    def tail(self, worker: str) -> str:
        """Return the last lines of ``worker``, indented; '' if it has printed nothing."""
        return "\n".join(f"    {line}" for line in list(self._tails.get(worker, ()))[-_SHOWN:])

    def begin(self, worker: str) -> None:
        """Forget the last lines of ``worker``: another process prints under its name from now on."""
        self._tails.pop(worker, None)

    def close(self) -> None:
        """Show all repetitions that are left, and close the files."""
        self.flush(float("inf"))
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _file(self, worker: str, line: str) -> None:
        if self._directory is None:
            return
        if worker not in self._files:
            # Buffered by line: all that arrived from a killed worker is in the file.
            self._files[worker] = (self._directory / f"{worker}.log").open("a", buffering=1, encoding="utf-8")
        self._files[worker].write(line + "\n")


def _show(stream: str, line: str) -> None:
    # Looked up for every line: notebooks and tests replace sys.stdout.
    target = sys.stderr if stream == "err" else sys.stdout
    try:
        print(line, file=target, flush=True)
    except (OSError, ValueError):
        pass  # the driver's output is closed
