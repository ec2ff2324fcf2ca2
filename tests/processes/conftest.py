"""Clusters of a test's own, and processes that are struck as they join one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

import rpcpipe as rp
from rpcpipe.cluster.process import WorkerProcess


@pytest.fixture
def trio() -> Iterator[rp.Cluster]:
    """Three workers of the test's own."""
    with rp.launch(workers=3, threads=1, timeout=20.0, heal=False) as made:
        yield made


@pytest.fixture
def struck(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[WorkerProcess], None]]:
    """What is done, once each, when a process that is to join a live group is told to."""
    strikes: list[Callable[[WorkerProcess], None]] = []
    send = WorkerProcess.send

    def sending(self: WorkerProcess, kind: str, payload: object = None) -> None:
        send(self, kind, payload)
        if kind == "join" and strikes:
            strikes.pop(0)(self)

    monkeypatch.setattr(WorkerProcess, "send", sending)
    return strikes
