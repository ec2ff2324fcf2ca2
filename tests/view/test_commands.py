"""``rpcpipe top`` and ``rpcpipe view``, through a terminal."""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest

import rpcpipe as rp
from rpcpipe.__main__ import main
from support.local_cluster import LocalCluster
from support.models import batches, cross_entropy, mlp, sgd

SECONDS = 60.0


@pytest.fixture
def pipe() -> rp.Pipeline:
    return rp.Pipeline(mlp(), LocalCluster(2), loss=cross_entropy, optimizer=sgd, chunks=2)


@pytest.fixture
def run(pipe: rp.Pipeline, tmp_path: Path) -> Path:
    """A file of one step."""
    path = tmp_path / "run.jsonl"
    pipe.on_step(path)
    train(pipe)
    return path


def train(pipe: rp.Pipeline) -> rp.StepResult:
    [batch] = batches(1)
    return pipe.train_step(*batch)


@pytest.fixture
def terminal() -> Iterator[Any]:
    """Starts ``rpcpipe`` in a terminal of 100 columns."""
    started = []

    def start(*arguments: str, **environment: str) -> Any:
        child = pexpect.spawn(
            sys.executable, ["-m", "rpcpipe", *arguments], timeout=SECONDS, encoding="utf-8", dimensions=(40, 100),
            env={**os.environ, **environment},
        )  # fmt: skip
        started.append(child)
        return child

    yield start
    for child in started:
        child.close(force=True)


def end_by_ctrl_c(child: Any) -> int | None:
    child.sendintr()
    child.expect(pexpect.EOF)
    child.close()
    status: int | None = child.exitstatus
    return status


def test_top_follows_a_file_until_ctrl_c(pipe: rp.Pipeline, run: Path, terminal: Any) -> None:
    child = terminal("top", str(run), "--interval", "0.1")
    child.expect_exact("run.jsonl  [file]")
    child.expect_exact("step 0, loss")
    result = train(pipe)
    child.expect_exact(f"step 1, loss {result.loss:.4g}")
    assert end_by_ctrl_c(child) == 0


def test_top_shows_a_live_run_until_it_ends(pipe: rp.Pipeline, terminal: Any) -> None:
    with rp.view(pipe) as view:
        train(pipe)
        child = terminal("top", "--interval", "0.1", RPCPIPE_VIEW=view.url)
        child.expect_exact("Pipeline(1f1b, 2 stages, 2 micro-batches, 1 step trained)  [live]")
        child.expect("planned:.*worker 0.*worker 1.*measured:.*worker 0.*worker 1")
        train(pipe)
        child.expect_exact("2 steps trained")
    child.expect("no live view answers at 127.0.0.1:[0-9]+: the run has ended")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 2


def test_view_serves_a_file_until_ctrl_c(run: Path, terminal: Any) -> None:
    child = terminal("view", str(run))
    child.expect(r"is shown at (http://127\.0\.0\.1:[0-9]+/\?token=\S+) ")
    url = child.match[1]
    with urllib.request.urlopen(url.replace("/?", "/state?"), timeout=SECONDS) as reply:
        assert json.load(reply)["title"] == "run.jsonl"
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(url[:-1], timeout=SECONDS)
    assert end_by_ctrl_c(child) == 0


# --- without a terminal ---


def test_top_prints_once_where_there_is_no_terminal(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", str(run)]) == 0
    assert capsys.readouterr().out.startswith("run.jsonl  [file]\nstep 0, loss")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["top"], "rpcpipe top needs the URL of a live view or a file of JSON lines, or RPCPIPE_VIEW"),
        (["top", "gone.jsonl"], "No such file or directory: 'gone.jsonl'"),
        (["view", "gone.jsonl"], "No such file or directory: 'gone.jsonl'"),
        (["top", "http://127.0.0.1:9/?token=x"], "no live view answers at 127.0.0.1:9"),
        (["top", "http://[::/?token=x"], "Invalid IPv6 URL"),
        (["top", "ftp://x"], "No such file"),
    ],
)
def test_what_is_no_run_is_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RPCPIPE_VIEW", raising=False)
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["top", "x", "--interval", "0"], ["view", "x", "--port", "65536"]])
def test_wrong_numbers_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert arguments[2] in capsys.readouterr().err


def test_a_wrong_token_is_said(pipe: rp.Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    with rp.view(pipe) as view:
        assert main(["top", view.url + "x"]) == 2
    assert "the view refuses: the token is missing or wrong" in capsys.readouterr().err
