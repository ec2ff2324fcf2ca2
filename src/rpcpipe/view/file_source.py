"""A run as its file of JSON lines tells it; the file may grow."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rpcpipe._arguments import require_path
from rpcpipe.errors import require
from rpcpipe.schedules import Timeline
from rpcpipe.view.history import History, Point

_BLOCK = 1 << 22  # bytes that are read and parsed at a time


class FileSource:
    """The steps of a file that ``rp.callbacks.JsonLines`` wrote. A ``Source``.

    It has no timelines, workers or events, which are not in the file. Raises ArgumentError unless the first line is a
    step's record, and OSError for a file that cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = require_path("path", path)
        self.history, self.version = History(), 0
        self._read, self._rest, self._identity = 0, b"", 0
        self._figures: dict[str, Any] = {}
        self.unreadable = 0
        self.refresh()
        require(
            bool(self._figures) or not self.unreadable,
            f"{self.path} was not written by rp.callbacks.JsonLines: no line of it is a step's record",
        )

    def refresh(self) -> None:
        """Read the lines that are new; of a file that was replaced or has become shorter, all."""
        with self.path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._identity or status.st_size < self._read:
                self.history.clear()
                self._figures, self._read, self._rest, self._identity = {}, 0, b"", status.st_ino
            file.seek(self._read)
            while block := file.read(_BLOCK):
                self._read += len(block)
                *lines, self._rest = (self._rest + block).split(b"\n")
                for line in lines:
                    self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            figures = json.loads(line, parse_constant=lambda name: None)
            self.history.add(Point.of(figures))
            self._figures = figures
        except (ValueError, KeyError, TypeError):
            self.unreadable += bool(line.strip())

    def state(self) -> dict[str, Any]:
        """Return the file's name and the last step."""
        skipped = f", {self.unreadable} lines are no records" if self.unreadable else ""
        return {
            "title": f"{Path(self.path).name}{skipped}", "state": "file", "figures": self._figures, "workers": [],
            "stages": {"header": [], "rows": []}, "events": [],
        }  # fmt: skip

    def timelines(self) -> list[Timeline]:
        """Return none."""
        return []
