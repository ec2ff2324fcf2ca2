from __future__ import annotations

from pathlib import Path

import pytest

import rpcpipe as rp
from rpcpipe.cluster.worker_logs import Lines, WorkerLogs


def test_lines_come_whole_whatever_the_pieces() -> None:
    lines = Lines()
    assert lines.feed("hé".encode()[:2]) == []
    assert lines.feed("hé".encode()[2:] + b"llo\nwor") == ["héllo"]
    assert lines.feed(b"ld\n\xff\n") == ["world", "�"]
    assert lines.feed(b"10%\r50%\r100%\r\nrest") == ["100%"]
    assert lines.end() == ["rest"]
    assert lines.end() == []


def test_a_line_without_end_is_cut() -> None:
    lines = Lines()
    found = lines.feed(b"x" * 200_000)
    assert [len(line) for line in found] == [65536] * 3
    assert len(lines.end()[0]) == 200_000 - 3 * 65536


def test_repetitions_are_folded(capsys: pytest.CaptureFixture[str]) -> None:
    logs = WorkerLogs()
    for index in range(5):
        logs.feed("worker0", "out", "same", index * 0.1)
    logs.feed("worker1", "out", "same", 0.5)
    logs.feed("worker1", "out", "other", 0.6)
    assert capsys.readouterr().out == "[worker0] same\n[worker1] other\n"
    logs.flush(0.9)
    assert capsys.readouterr().out == ""
    logs.feed("worker0", "out", "same", 1.2)
    assert capsys.readouterr().out == "[worker0], [worker1] (5 more times) same\n[worker0] same\n"
    logs.close()
    assert capsys.readouterr().out == ""


def test_errors_go_to_stderr_and_the_tail_keeps_the_last_lines(capsys: pytest.CaptureFixture[str]) -> None:
    logs = WorkerLogs()
    for index in range(30):
        logs.feed("worker0", "err", f"line {index}", 0.0)
    assert capsys.readouterr().err.startswith("[worker0] line 0\n[worker0] line 1\n")
    assert logs.tail("worker0").splitlines()[0] == "    line 20"
    assert logs.tail("worker0").endswith("line 29")
    assert logs.tail("worker1") == ""


def test_output_and_logging_arrive_with_their_stage_and_in_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import logging

    from helpers import cross_entropy, mlp, sgd

    def speak() -> None:
        import os

        print("to stdout, größer")
        logging.getLogger("mine").warning("through logging")
        os.write(2, b"past Python\n")

    with rp.launch(workers=2, threads=1, log_dir=tmp_path / "logs") as cluster:
        pipe = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=sgd)
        pipe.stages[1].call(lambda module: speak())
        worker = cluster.workers[1]
        prefix = f"[stage 1 {worker.host}:{worker.pid}]"
    captured = capsys.readouterr()
    assert captured.out == f"{prefix} to stdout, größer\n"
    assert sorted(captured.err.splitlines()) == [
        f"{prefix} WARNING:mine:through logging",
        f"{prefix} past Python",
    ]
    assert not (tmp_path / "logs" / "worker0.log").exists()
    assert sorted((tmp_path / "logs" / "worker1.log").read_text().splitlines()) == [
        "WARNING:mine:through logging",
        "past Python",
        "to stdout, größer",
    ]


def test_the_library_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    from helpers import batches, cross_entropy, mlp, sgd

    with rp.launch(workers=2, threads=1) as cluster:
        pipe = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=sgd)
        x, y = next(batches(1))
        pipe.train_step(x, y)
        pipe.train_step(x * float("nan"), y)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
