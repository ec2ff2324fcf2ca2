"""examples/repl.md is typed, line by line, at a real prompt."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pexpect

PAGE = (Path(__file__).parents[2] / "examples" / "repl.md").read_text()


def test_every_block_can_be_typed_at_the_prompt(tmp_path: Path) -> None:
    child = pexpect.spawn(
        sys.executable, ["-i", "-q"], cwd=str(tmp_path), encoding="utf-8", timeout=60, echo=False,
        env={**os.environ, "PYTHON_BASIC_REPL": "1", "TERM": "dumb", "PYTHONSTARTUP": ""},
    )  # fmt: skip
    child.expect(">>> ")
    said = ""
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 8
    for block in blocks:
        for line in block.splitlines():
            child.sendline(line)
            child.expect([">>> ", r"\.\.\. "])
            said += str(child.before).replace("\r", "")
        assert child.after == ">>> ", f"a block ends amid a statement:\n{block}"
    child.sendeof()
    child.expect(pexpect.EOF)
    assert "Error" not in said.replace("RuntimeError on stage 0", "")
    assert "RuntimeError on stage 0" in said
    assert "Cluster(2 workers, live)" in said
    assert re.search(r"^step 19: loss", said, re.MULTILINE)
    assert re.search(r"^worker 1 \|", said, re.MULTILINE)
    assert re.search(r"^[0-9]+% right$", said, re.MULTILINE)
