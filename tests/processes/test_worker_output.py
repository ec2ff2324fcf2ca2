"""What workers print and log, at the driver and in files."""

from __future__ import annotations

from pathlib import Path

import pytest

import rpcpipe as rp


def test_output_and_logging_arrive_with_their_stage_and_in_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import logging

    from support.models import cross_entropy, mlp, sgd

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
    from support.models import batches, cross_entropy, mlp, sgd

    with rp.launch(workers=2, threads=1) as cluster:
        pipe = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=sgd)
        x, y = next(batches(1))
        pipe.train_step(x, y)
        pipe.train_step(x * float("nan"), y)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
