from __future__ import annotations

import pytest

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
