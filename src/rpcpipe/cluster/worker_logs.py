"""What workers print: prefixed, folded, kept for their last words, and in a file each.

Many workers say the same (a warning, once each) and one worker may say the same many times; the
first is shown at once, the others of the next second as one line with their number.
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
    """Bytes to lines. Of a progress bar's rewritten line the last state counts."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        """The lines that ``data`` completes; none is longer than 64 KiB."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        while len(self._rest) > _LONGEST:
            lines.append(self._rest[:_LONGEST])
            self._rest = self._rest[_LONGEST:]
        return [_plain(line) for line in lines]

    def end(self) -> list[str]:
        """What is left without a newline."""
        rest, self._rest = self._rest, b""
        return [_plain(rest)] if rest else []


def _plain(line: bytes) -> str:
    return line.decode("utf-8", "replace").rstrip("\r").rpartition("\r")[2]


@dataclass
class _Fold:
    """Repetitions of a line since it was shown."""

    stream: str
    until: float
    workers: list[str] = field(default_factory=list)


class Logs:
    """The output of all workers. ``label(worker)`` is the prefix; ``directory`` gets a file per worker."""

    def __init__(self, directory: Path | None = None) -> None:
        self.label: Callable[[str], str] = lambda worker: f"[{worker}]"
        self._directory = directory
        self._files: dict[str, IO[str]] = {}
        self._tails: dict[str, deque[str]] = {}
        self._folds: dict[str, _Fold] = {}
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)

    def feed(self, worker: str, stream: str, line: str, now: float) -> None:
        """``worker`` wrote ``line`` on its "out" or "err" at ``now`` (seconds, monotonic)."""
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
        """Sum up the repetitions whose second is over."""
        for line in [line for line, fold in self._folds.items() if fold.until <= now]:
            fold = self._folds.pop(line)
            if fold.workers:
                labels = ", ".join(self.label(worker) for worker in dict.fromkeys(fold.workers))
                times = "once more" if len(fold.workers) == 1 else f"{len(fold.workers)} more times"
                _show(fold.stream, f"{labels} ({times}) {line}")

    def tail(self, worker: str) -> str:
        """The last lines of ``worker``, indented; '' if it has printed nothing."""
        return "\n".join(f"    {line}" for line in list(self._tails.get(worker, ()))[-_SHOWN:])

    def close(self) -> None:
        """Show what is folded and close the files."""
        self.flush(float("inf"))
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _file(self, worker: str, line: str) -> None:
        if self._directory is None:
            return
        if worker not in self._files:
            # Line by line: of a killed worker everything that arrived is in the file.
            self._files[worker] = (self._directory / f"{worker}.log").open("a", buffering=1, encoding="utf-8")
        self._files[worker].write(line + "\n")


def _show(stream: str, line: str) -> None:
    # Looked up at every line: notebooks and tests replace sys.stdout.
    target = sys.stderr if stream == "err" else sys.stdout
    try:
        print(line, file=target, flush=True)
    except (OSError, ValueError):
        pass  # nobody reads the driver's output any more
