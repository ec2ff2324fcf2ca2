"""The site builds strictly, has every page and public name, and loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rpcpipe as rp

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)], cwd=ROOT,
        capture_output=True, text=True, timeout=100, check=False, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def test_every_page_is_built_and_loads_nothing_from_elsewhere(site: Path) -> None:
    built = {page.relative_to(site).with_suffix("").as_posix() for page in site.rglob("*.html")}
    assert {page.relative_to(DOCS).with_suffix("").as_posix() for page in DOCS.rglob("*.md")} == built - {"404"}
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert not re.findall(r'src="(?:https?:)?//[^"]*"', text), page
        assert not re.findall(r'<link[^>]*rel="(?:stylesheet|preconnect)"[^>]*href="(?:https?:)?//', text), page


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    pages = "".join(page.read_text() for page in (site / "api").glob("*.html"))
    modules = {"callbacks", "layers", "planning", "schedules"}
    for name in rp.__all__:
        assert re.search(rf'<h\d id="rpcpipe\.(?:[\w.]+\.)?{name}[".]', pages), f"{name} is in no page of docs/api"
        if name not in modules:
            assert re.search(rf'<h\d id="rpcpipe\.(?:[\w.]+\.)?{name}"', pages), name


def test_the_order_is_the_index_s(site: Path) -> None:
    order = re.findall(r"\]\(([\w/-]+)\.md\)", "".join(re.findall(r"^\| \[.*$", (DOCS / "index.md").read_text(), re.M)))
    shown = re.findall(r'<a href="([\w/-]+)\.html" class="md-nav__link', (site / "index.html").read_text())
    assert list(dict.fromkeys(name for name in shown if name != "index")) == list(dict.fromkeys(order))
