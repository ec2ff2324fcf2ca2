"""Order the site as docs/index.md does: a hook of mkdocs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    """Return mkdocs' configuration with the navigation that the tables of index.md make, a section for each."""
    index = (Path(config["docs_dir"]) / "index.md").read_text()
    config["nav"] = [{"Overview": "index.md"}, *sections(index)]
    return config


def sections(index: str) -> list[dict[str, Any]]:
    """Return by heading of ``index`` the pages that the rows of its table link to, by their titles there."""
    found: list[dict[str, Any]] = []
    listed: set[str] = set()
    for part in index.split("\n## ")[1:]:
        heading, _, body = part.partition("\n")
        rows = "".join(re.findall(r"^\| \[.*$", body, re.MULTILINE))
        pages = [link for link in re.findall(r"\[([^\]]+)\]\(([^)#:]+\.md)\)", rows) if link[1] not in listed]
        listed |= {page for _, page in pages}
        if pages:
            found.append({heading: [{title: page} for title, page in pages]})
    return found
