"""docs/proofs.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROOFS = (ROOT / "docs" / "proofs.md").read_text()


def test_what_is_proved_has_its_test() -> None:
    rows = re.findall(r"^\| .* \| `((?:[\w/]+/)?test_\w+\.py)(?:::(\w+))?` \|$", PROOFS, re.MULTILINE)
    assert len(rows) > 25
    for file, function in rows:
        source = (ROOT / "tests" / file).read_text()
        assert not function or f"\ndef {function}(" in source, f"{file}::{function}"
