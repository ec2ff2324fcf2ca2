"""What the pages for newcomers show runs, block by block."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {
    "quickstart.md": 1,
    "guide/coming-from.md": 2,
    "guide/what-travels.md": 4,
    "guide/troubleshooting.md": 1,
}


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_run(page: str, capfd: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert len(blocks) == PAGES[page]
    space: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        exec(block, space)
    space["cluster"].close()
    said = capfd.readouterr().out
    if page == "quickstart.md":
        assert space["accuracy"] > 0.8
        assert re.search(r"bubble \d\d\.\d%", said)
    if page == "guide/what-travels.md":
        assert "{'worker0': True, 'worker1': True}" in said
    if page == "guide/troubleshooting.md":
        assert re.search(r"^\[\d, \d\]$", said, re.MULTILINE)
