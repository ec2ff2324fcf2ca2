"""What docs/guide/models.md shows runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


@pytest.mark.parametrize("number", [0, 1, 2, 3, 4])
def test_the_programs_of_docs_models_run(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "guide" / "models.md").read_text()
    program = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[number]
    exec(program, {"__name__": "__main__"})
    assert capsys.readouterr().out.strip().endswith(("True", "True", "100])", "torch.Size([4])", "True")[number])
