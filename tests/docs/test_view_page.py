"""The blocks of docs/guide/view.md run, and its commands are those that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import rpcpipe as rp
from rpcpipe.__main__ import main
from support.local_cluster import LocalCluster

TEXT = (Path(__file__).parents[2] / "docs" / "guide" / "view.md").read_text()


def test_the_block_opens_a_view_of_the_steps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rp, "launch", lambda workers: LocalCluster(workers))
    [block] = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    space: dict[str, object] = {}
    exec(block, space)
    view = space["view"]
    assert isinstance(view, type(rp.view(space["pipe"])))  # type: ignore[arg-type]
    assert capsys.readouterr().out == f"{view.url}\n"
    assert main(["top", view.url]) == 0
    assert "step 2, loss" in capsys.readouterr().out
    space["pipe"].close()  # type: ignore[attr-defined]


def test_the_commands_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    commands = re.findall(r"^rpcpipe (\w+) ", TEXT, re.MULTILINE)
    assert set(commands) == {"top", "view"}
    for command in commands:
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        assert f"usage: rpcpipe {command}" in capsys.readouterr().out
