"""The examples in a short form: as programs in this process, which has torch and a template already."""

from __future__ import annotations

import math
import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

import rpcpipe as rp

EXAMPLES = Path(__file__).parents[2] / "examples"

Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs an example with arguments, as ``__main__``; what it prints."""

    def call(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES / name), *arguments])
        monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return call


def test_pipedream(run: Run, tmp_path: Path) -> None:
    plot = tmp_path / "curves.svg"
    sizes = ["--batches", "16", "--batch", "4", "--dim", "32", "--context", "16", "--rounds", "1"]
    out = run("pipedream.py", *sizes, "--plot", str(plot))
    assert "vertical sync" in plot.read_text()
    for name in ("1f1b", "stash", "vertical sync", "latest", "2bw"):
        assert re.search(rf"^{name} +loss [0-9.]+ over the last 16 of 16 batches$", out, re.MULTILINE)
        assert re.search(rf"^{name} +[0-9.]+ +[0-9.]+ +[0-9.]+$", out, re.MULTILINE)


def test_memory(run: Run) -> None:
    """Every row: what was predicted is what was measured."""
    out = run("memory.py", "--workers", "2", "--chunks", "4", "--dim", "32", "--context", "16")
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith(("| gpipe", "| 1f1b", "| zb-h1"))]
    assert len(rows) == 9
    assert all(predicted == measured for _, _, predicted, measured, _, _ in rows)


def test_plan(run: Run) -> None:
    """A plan is made and run, and its time is of the measured one's size."""
    sizes = ["--batch", "8", "--dim", "32", "--context", "16", "--blocks", "4", "--rounds", "3"]
    out = run("plan.py", "--best", *sizes)
    found = re.search(r"^Plan for 2 workers.*: ([0-9.]+) s a step, bubble", out, re.MULTILINE)
    measured = re.search(r"^measured: ([0-9.]+) s a step$", out, re.MULTILINE)
    assert found is not None
    assert measured is not None
    assert "why" in out
    assert 0.1 < float(measured[1]) / float(found[1]) < 100


def test_gpt(run: Run, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    sizes = [
        "--workers",
        "2",
        "--steps",
        "12",
        "--batch",
        "8",
        "--context",
        "16",
        "--chunks",
        "2",
        "--vocabulary",
        "300",
    ]
    out = run("gpt.py", "--text", str(text), *sizes)
    losses = [float(loss) for loss in re.findall(r"loss ([0-9.]+)", out)]
    assert losses[-1] < 0.8 * losses[0]
    assert "by formula for 2 free cores" in out
    assert re.search(r"^it writes: A class .", out, re.MULTILINE)


def test_gpt_plan_only(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        run("gpt.py", "--plan-only", "gpt3-175b")
    out = capsys.readouterr().out
    assert "GPT of 175.22 billion parameters, 64 sequences of 2048 a step" in out
    assert re.search(r"^Plan for 8 workers: [0-9.]+ s a step", out, re.MULTILINE)
    assert re.search(r"^  micro-batches +64 of 1", out, re.MULTILINE)
    assert "worker 7 |" in out


def test_bert(run: Run) -> None:
    """The example itself asserts that the loss is the unsplit model's."""
    out = run("bert.py", "--steps", "5", "--batch", "16", "--length", "24")
    assert re.search(r"^loss [0-9.]+ through 4 stages, [0-9.]+ in one process$", out, re.MULTILINE)
    assert re.search(r"^loss [0-9.]+, words [0-9.]+, pairs [0-9.]+ on held-out pairs$", out, re.MULTILINE)


def test_image(run: Run) -> None:
    out = run("image.py", "--epochs", "2", "--batch", "128")
    accuracies = re.findall(r"([0-9.]+)%", out)
    assert len(accuracies) == 3
    assert accuracies[1] == accuracies[2]  # through three stages, and in one process


def test_multi_host() -> None:
    done = subprocess.run(
        ["bash", str(EXAMPLES / "multi_host.sh")], capture_output=True, text=True, timeout=110, check=False,
        env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"^loss [0-9.]+$", done.stdout, re.MULTILINE)
    assert done.stdout.endswith("all three ended with status 0\n")


def test_two_d(run: Run) -> None:
    """Who is where, and the pipeline's losses beside one process's."""
    out = run("two_d.py", "--steps", "3", "--batch", "16", "--dim", "32", "--shard")
    for stage, replica, worker in ((0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 3)):
        assert re.search(rf"^ +{stage} of replica {replica} +worker{worker} ", out, re.MULTILINE)
    rows = re.findall(r"^ +\d +([0-9.]+) +([0-9.]+) +([0-9.e+-]+)$", out, re.MULTILINE)
    assert len(rows) == 3
    assert all(float(difference) < 1e-6 for _, _, difference in rows)


def test_immortal(run: Run, tmp_path: Path) -> None:
    """Workers are killed and replaced, and the example itself compares the weights."""
    out = run("immortal.py", "--steps", "30", "--every", "0.1", "--dim", "32", "--picture", str(tmp_path / "gap.svg"))
    assert re.search(r"^ +[0-9.]+ s  worker[01] died: was killed by SIGKILL", out, re.MULTILINE)
    assert re.search(r"^ +[0-9.]+ s  worker[01] replaced, within [0-9.]+ s, by process \d+", out, re.MULTILINE)
    assert re.search(r"^\d+ kills; same weights as the undisturbed run: yes$", out, re.MULTILINE)
    assert "around the first of" in (tmp_path / "gap.svg").read_text()


def test_immortal_counts_no_kill_of_a_worker_that_has_died_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    kill = runpy.run_path(str(EXAMPLES / "immortal.py"))["kill"]
    cluster, kills, killed = SimpleNamespace(workers=[SimpleNamespace(pid=7)]), list[float](), list[int]()
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(pid))
    kill(cluster, kills)
    assert killed == [7]
    assert len(kills) == 1

    def gone(pid: int, number: int) -> None:
        raise ProcessLookupError

    monkeypatch.setattr(os, "kill", gone)
    kill(cluster, kills)
    assert len(kills) == 1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_finetune_lora_and_generate(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reads what finetune.py has saved; the programs compare the losses with one process's themselves.

    On the same workers, since the import of transformers takes them longer than all the rest.
    """
    with rp.launch(workers=2, threads=1) as cluster:
        monkeypatch.setattr(rp, "launch", lambda workers: nullcontext(cluster))
        _finetune_lora_and_generate(run, tmp_path)


def _finetune_lora_and_generate(run: Run, tmp_path: Path) -> None:
    out = run("finetune.py", "--steps", "24", "--out", str(tmp_path / "full"))
    before, after = (float(found) for found in re.findall(r"^perplexity .* ([0-9.]+)$", out, re.MULTILINE))
    assert after < 0.5 * before
    assert_same_loss(out)
    [folder] = (tmp_path / "full" / "tuned").glob("*-step-*")
    out = run("lora.py", "--steps", "12", "--model", str(folder), "--out", str(tmp_path / "lora"))
    losses = [float(loss) for loss in re.findall(r"loss ([0-9.]+)$", out, re.MULTILINE)]
    assert losses[1] < losses[0] < math.log(before)
    assert_same_loss(out)
    out = run("generate.py", "--model", str(folder), "--tokens", "5", "The with statement", "class ")
    assert re.search(r"""^.The with statement""", out, re.MULTILINE)
    assert len(re.findall(r"""^['"]""", out, re.MULTILINE)) == 2
    assert "loss" in run("generate.py", "--steps", "2", "--tokens", "2")


def assert_same_loss(out: str) -> None:
    found = re.search(r"loss ([0-9.]+) in one process, ([0-9.]+) in the pipeline$", out, re.MULTILINE)
    assert found is not None
    assert float(found[1]) == pytest.approx(float(found[2]), abs=1e-4)


def test_unet(run: Run) -> None:
    out = run("unet.py", "--steps", "25")
    first, *_, last = (float(loss) for loss in re.findall(r"loss ([0-9.]+)", out))
    assert last < 0.7 * first
    assert "the model's own forward: True" in out


def test_a_run_that_is_killed_goes_on_to_the_bit(run: Run, tmp_path: Path) -> None:
    """Dropout, bfloat16, warm-up, clipping and tied embeddings, all of them as if nothing had been."""
    sizes = ["--steps", "8", "--every", "3"]
    whole = run("resumed.py", "--out", str(tmp_path / "whole"), *sizes)
    killed = [sys.executable, str(EXAMPLES / "resumed.py"), "--out", str(tmp_path / "killed"), *sizes]
    died = subprocess.run([*killed, "--die-after", "5"], capture_output=True, text=True, timeout=100, check=False)
    assert died.returncode == -signal.SIGKILL
    resumed = run("resumed.py", "--out", str(tmp_path / "killed"), *sizes)
    assert "begins after step 3\n" in resumed
    losses = re.findall(r"step (\d+) loss (\S+)", whole)
    assert len(losses) == 8
    assert re.findall(r"step (\d+) loss (\S+)", died.stdout) == losses[:5]
    assert re.findall(r"step (\d+) loss (\S+)", resumed) == losses[3:]
