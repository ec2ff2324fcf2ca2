"""The examples, as a user runs them, in a short form."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_pipedream(tmp_path: Path) -> None:
    plot = tmp_path / "curves.svg"
    sizes = ["--batches", "16", "--batch", "4", "--dim", "32", "--context", "16", "--rounds", "1"]
    out = run("pipedream.py", *sizes, "--plot", str(plot))
    assert "vertical sync" in plot.read_text()
    for name in ("1f1b", "stash", "vertical sync", "latest", "2bw"):
        assert re.search(rf"^{name} +loss [0-9.]+ over the last 16 of 16 batches$", out, re.MULTILINE)
        assert re.search(rf"^{name} +[0-9.]+ +[0-9.]+ +[0-9.]+$", out, re.MULTILINE)


def test_memory() -> None:
    """Every row: what was predicted is what was measured."""
    out = run("memory.py", "--workers", "2", "--chunks", "4", "--dim", "32", "--context", "16")
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith(("| gpipe", "| 1f1b", "| zb-h1"))]
    assert len(rows) == 9
    assert all(predicted == measured for _, _, predicted, measured, _, _ in rows)


def test_plan() -> None:
    """A plan is made and run, and its time is of the measured one's size."""
    sizes = ["--batch", "8", "--dim", "32", "--context", "16", "--blocks", "4", "--rounds", "3"]
    out = run("plan.py", "--best", *sizes)
    found = re.search(r"^Plan for 2 workers.*: ([0-9.]+) s a step, bubble", out, re.MULTILINE)
    measured = re.search(r"^measured: ([0-9.]+) s a step$", out, re.MULTILINE)
    assert found is not None
    assert measured is not None
    assert "why" in out
    assert 0.1 < float(measured[1]) / float(found[1]) < 100
