"""Every block of Python on a page runs: those that no other test of a page knows, page by page, on real workers.

What is no program (a signature, the middle of one) is marked ``py`` on the page, not ``python``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rpcpipe as rp

DOCS = Path(__file__).parents[2] / "docs"
PAGES = (
    "asynchronous",
    "checkpoints",
    "generation",
    "memory",
    "metrics",
    "parallelism",
    "planning",
    "transformers",
    "verify",
)
# Those that have a test of their own, which names them.
ELSEWHERE = {
    "cheatsheet.md", "quickstart.md", "guide/coming-from.md", "guide/data.md", "guide/finetuning.md", "guide/models.md",
    "guide/training.md", "guide/troubleshooting.md", "guide/view.md", "guide/what-travels.md",
}  # fmt: skip


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def test_no_page_is_left_out() -> None:
    found = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md") if blocks(page)}
    assert found == ELSEWHERE | {f"guide/{page}.md" for page in PAGES}
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("*.py") if path != Path(__file__))
    assert not [page for page in ELSEWHERE if Path(page).name not in tests]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[rp.Cluster]]:
    """The clusters that a page has launched, closed at the end."""
    clusters: list[rp.Cluster] = []
    launch = rp.launch

    def noted(**arguments: Any) -> rp.Cluster:
        clusters.append(launch(**arguments))
        return clusters[-1]

    monkeypatch.setattr(rp, "launch", noted)
    yield clusters
    for cluster in clusters:
        cluster.close()


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_run(
    page: str, launched: list[rp.Cluster], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(DOCS / "guide" / f"{page}.md"):
        exec(block, space)
    assert launched or page == "memory"  # which asks before anything is launched
    if page == "generation":
        assert "transformers' own tokens: True" in capsys.readouterr().out
