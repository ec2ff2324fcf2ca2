"""What README shows, and the page of schedules, runs and is what comes out."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import rpcpipe as rp

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SCHEDULES = (ROOT / "docs" / "guide" / "schedules.md").read_text()


def test_the_program_runs(tmp_path: Path) -> None:
    program = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert program is not None
    script = tmp_path / "program.py"
    script.write_text(program[1])
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=True)
    loss = float(done.stdout.split()[1].rstrip(","))
    assert loss < 1.3
    assert "in flight (2, 1)" in done.stdout


def test_the_verification_says_what_the_page_says(tmp_path: Path) -> None:
    program, line = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[:2]
    [said] = re.findall(r"```\n(2 steps: .*)\n```", README)
    script = tmp_path / "program.py"
    script.write_text(program + line)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=90, check=True)
    assert said in done.stdout.splitlines()


def test_the_drawn_schedule_is_the_real_one() -> None:
    assert rp.schedules.get("1f1b", 4, 8).simulate().to_text() in SCHEDULES


def test_every_schedule_is_in_the_table_with_its_figures() -> None:
    for name in rp.schedules.names():
        virtual = rp.schedules.fewest_virtual_stages(name)
        timeline = rp.schedules.get(name, 4, 8, virtual).simulate()
        row = next(line for line in SCHEDULES.splitlines() if line.startswith(f"| `{name}`"))
        assert f"| {timeline.makespan / virtual:g} | {100 * timeline.bubble:.1f} % |" in row


def test_it_stays_short() -> None:
    assert len(README.splitlines()) <= 200
