from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import rpcpipe as rp
from rpcpipe.__main__ import main


def test_a_schedule_is_drawn_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    csv, page = tmp_path / "s.csv", tmp_path / "s.html"
    assert (
        main(["schedule", "interleaved", "--workers", "2", "--chunks", "4", "--csv", str(csv), "--html", str(page)])
        == 0
    )
    out = capsys.readouterr().out
    assert "interleaved: 2 workers, 4 stages, 4 micro-batches" in out
    assert rp.schedules.get("interleaved", 2, 4, 2).simulate().to_text() in out
    assert page.exists()
    assert main(["schedule", str(csv)]) == 0
    assert "s: 2 workers, 4 stages, 4 micro-batches" in capsys.readouterr().out


def test_the_table_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "--list", "--workers", "4", "--chunks", "6"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in rp.schedules.names())
    assert "needs at least 8 micro-batches" in out


def test_wrong_arguments_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "zigzag"]) == 2
    assert "unknown schedule 'zigzag'" in capsys.readouterr().err
    assert main(["schedule", "no-such-file.csv"]) == 2


def test_python_dash_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rpcpipe", "schedule", "1f1b"], capture_output=True, text=True, timeout=60, check=True
    )
    assert "bubble 27.3%" in done.stdout


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--layers", "24", "--hidden", "1024", "--heads", "16", "--vocab", "50257", "--seq", "1024"]
    machine = [
        "--workers",
        "8",
        "--memory",
        "16GiB",
        "--flops",
        "125e12",
        "--bandwidth",
        "16e9",
        "--batch",
        "64",
        "--draw",
    ]
    assert main(["plan", "gpt", *sizes, *machine]) == 0
    out = capsys.readouterr().out
    assert "GPT of 0.41 billion parameters" in out
    assert "why" in out
    assert "worker 0 |" in out
    assert main(["plan", "gpt", *sizes, *machine, "--memory", "100MB"]) == 2
    assert "What would do" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", "gpt", *sizes, *machine, "--memory", "much"])
