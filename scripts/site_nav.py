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
    """Return by heading of ``index`` the pages in its table, by their titles there."""
    found = []
    for part in index.split("\n## ")[1:]:
        heading, _, body = part.partition("\n")
        pages = re.findall(r"^\| \[([^\]]+)\]\(([^)#]+)\) \|", body, re.MULTILINE)
        if pages:
            found.append({heading: [{title: page} for title, page in pages]})
    return found
