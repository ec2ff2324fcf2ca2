from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from rpcpipe.__main__ import main
from rpcpipe.cluster import doctor


def test_this_machine_is_well(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "leftovers", list)  # other tests' killed drivers may just be leaving theirs
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for what in ("versions", "loopback", "interfaces", "host name", "CUDA", "shared memory", "leftover", "a worker"):
        assert what in out
    assert "BAD" not in out
    assert "launched and called" in out
    assert "take no connections while a job runs" in out


def test_what_is_bad_gives_status_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_launch", lambda: doctor.Finding("a worker", None, ""))
    monkeypatch.setenv("RANK", "0")
    assert main(["doctor"]) == 1
    assert "BAD  WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set" in capsys.readouterr().out


def test_the_join_port_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("RPCPIPE_SECRET", "a secret of the tests")
        monkeypatch.setenv("RANK", "1")
        assert [(found.check, found.ok) for found in doctor._job()] == [("multi-host", True), ("join port", True)]
        monkeypatch.setenv("RANK", "0")
        job, taken = doctor._job()
        assert job.ok
        assert taken.ok is False
        assert "in use" in taken.detail


def test_a_leftover_worker_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process with a worker's command line; its parent stands in for the system's first process."""
    with subprocess.Popen([sys.executable, "-c", "input()", "-m", "rpcpipe.worker"], stdin=subprocess.PIPE) as child:
        monkeypatch.setattr("rpcpipe.cluster.process._INIT", os.getpid())
        found = doctor._leftovers()
        child.communicate(b"\n")
    assert found.ok is False
    assert str(child.pid) in found.detail
