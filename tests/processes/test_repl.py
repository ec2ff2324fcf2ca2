"""rpcpipe at a prompt and in a notebook, driven as a person drives them."""

from __future__ import annotations

import gc
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pexpect
import psutil
import pytest
import torch
from nbclient import NotebookClient

import rpcpipe as rp
from support.faults import wait_for
from support.models import batches, cross_entropy, mlp, sgd

PROMPT = r"\n?>>> "


class Prompt:
    """``python -i`` on a pseudo-terminal."""

    def __init__(self, folder: Path) -> None:
        self.child = pexpect.spawn(
            sys.executable, ["-i", "-q"], cwd=str(folder), encoding="utf-8", timeout=30, echo=False,
            env={**os.environ, "PYTHON_BASIC_REPL": "1", "TERM": "dumb", "PYTHONSTARTUP": ""},
        )  # fmt: skip
        self.child.expect(PROMPT)

    def enter(self, text: str) -> str:
        """Type ``text`` (an empty line ends a block); what is printed until the next prompt."""
        for line in text.strip("\n").split("\n"):
            self.child.sendline(line)
            self.child.expect([PROMPT, r"\n?\.\.\. "])
        if self.child.after.strip().startswith("..."):
            self.child.sendline("")
            self.child.expect(PROMPT)
        return str(self.child.before).replace("\r", "")


@pytest.fixture
def prompt(tmp_path: Path) -> Iterator[Prompt]:
    found = Prompt(tmp_path)
    yield found
    found.child.sendeof()
    found.child.expect(pexpect.EOF, timeout=10)
    found.child.close()
    assert found.child.exitstatus == 0


DEFINITIONS = """
import os, signal, time, torch, rpcpipe as rp
from torch import nn
class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
    def forward(self, x):
        if float(x.detach().abs().max()) > 1e6:
            time.sleep(30)
        return self.inner(x)

def loss(output, target):
    return ((output - target) ** 2).mean() * SCALE

SCALE = 2.0
def make():
    return rp.Pipeline([Mine() for _ in rp.launch(WORKERS, threads=1, heal=False).workers], rp.launch(WORKERS, threads=1, heal=False), loss=loss, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), chunks=2)

x = torch.ones(4, 4)
"""  # noqa: E501


def define(prompt: Prompt) -> None:
    for block in re.split(r"\n(?=\S)", DEFINITIONS.strip("\n")):
        assert "Error" not in prompt.enter(block)


def test_a_session_at_the_prompt(prompt: Prompt) -> None:
    define(prompt)
    prompt.enter("WORKERS = 2")
    assert prompt.enter("pipe = make()").strip() == ""
    assert re.match(r"step 0: loss \d", prompt.enter("pipe.train_step(x, x)"))
    shown = prompt.enter("pipe")
    assert re.search(r"1 +worker1 +cpu +1 +20 +0\.0 MiB +\d", shown)
    assert "Cluster(2 workers, live)" in prompt.enter("pipe.cluster")
    # The same shape again: the live cluster. Another one: a fresh cluster.
    assert "True" in prompt.enter("pipe.cluster is rp.launch(2, threads=1, heal=False)")
    prompt.enter("WORKERS = 3; pipe = make()")
    assert "step 0" in prompt.enter("pipe.train_step(x, x)")
    # After an exception.
    assert "ZeroDivisionError" in prompt.enter("pipe.stages[0].call(lambda module: 1 / 0)")
    assert "step 1" in prompt.enter("pipe.train_step(x, x)")
    # After a worker was killed.
    prompt.enter("os.kill(pipe.cluster.workers[1].pid, signal.SIGKILL)")
    assert "WorkerLost: stage 1 on worker1" in prompt.enter("pipe.train_step(x, x)")
    assert "1 lost" in prompt.enter("pipe.cluster")
    prompt.enter("pipe = make()")
    assert "step 0" in prompt.enter("pipe.train_step(x, x)")


@pytest.mark.alone
def test_ctrl_c_at_the_prompt(prompt: Prompt) -> None:
    define(prompt)
    prompt.enter("WORKERS = 2; pipe = make(); before = pipe.state_dict()")
    # In a step that hangs.
    prompt.child.sendline("pipe.train_step(x * 1e9, x)")
    [template] = psutil.Process(prompt.child.pid).children()
    workers = [child for child in template.children() if child.is_running()]
    busy = {worker.pid: worker.cpu_times().user for worker in workers}
    assert len(busy) == 2
    prompt.child.expect(pexpect.TIMEOUT, timeout=0.5)  # it hangs: no prompt comes
    start = time.monotonic()
    prompt.child.sendintr()
    prompt.child.expect("KeyboardInterrupt")
    assert time.monotonic() - start < 0.3
    prompt.child.expect(PROMPT)
    # The worker still sleeps in its forward: the workers have not got the Ctrl-C.
    assert prompt.enter("rp.launch(2, threads=1, heal=False).close()").strip() == ""
    prompt.enter("pipe = make()")
    # At an idle prompt.
    prompt.child.sendintr()
    prompt.child.expect("KeyboardInterrupt")
    prompt.child.expect(PROMPT)
    assert "step 0" in prompt.enter("pipe.train_step(x, x)")


def test_a_notebook(tmp_path: Path) -> None:
    cells = [
        *re.split(r"\n(?=\S)", DEFINITIONS.strip("\n"))[:2], *DEFINITIONS.strip("\n").split("\n\n"),
        "WORKERS = 2; pipe = make()", "pipe.train_step(x, x)", "pipe", "pipe.cluster", "pipe.schedule",
        "pipe.stages[1].call(lambda module: print('from a worker'))\npipe.cluster.close()",
    ]  # fmt: skip
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(book, timeout=60, resources={"metadata": {"path": str(tmp_path)}}).execute()
    found = [output for cell in book.cells for output in cell.outputs]
    tables = [output.data["text/html"] for output in found if output.output_type == "execute_result"]
    assert len(tables) == 4
    assert all(table.startswith("<b>") and "<td>" in table for table in tables)
    assert "<b>step 0: loss" in tables[0]
    assert any("[stage 1" in output.get("text", "") and "from a worker" in output["text"] for output in found)


def usage() -> tuple[int, int, float]:
    gc.collect()
    process = psutil.Process()
    return process.num_fds(), process.num_threads(), process.memory_info().rss / 2**20


@pytest.mark.alone
def test_launches_leave_no_trace() -> None:
    found = []
    for cycle in range(20):
        cluster = rp.launch(workers=1 + cycle % 2, threads=1, heal=False)
        pipe = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=sgd, chunks=2)
        pipe.train_step(*next(batches(1)))
        if cycle in (2, 3, 10):  # some end badly, one with the template
            victim = psutil.Process(cluster.workers[0].pid)
            (victim.parent() if cycle == 10 else victim).kill()  # type: ignore[union-attr]
            wait_for(lambda lost=cluster: not lost.healthy)  # type: ignore[misc]
            with pytest.raises(rp.WorkerLost):
                pipe.train_step(*next(batches(1)))
        cluster.close()
        del cluster, pipe
        found.append(usage())
    fds, threads, memory = zip(*found, strict=True)
    # torch's agent closes connections to the dead in its own time; a failed call's timer has a second.
    wait_for(lambda: usage()[0] <= fds[1] and usage()[1] <= threads[1])
    assert memory[-1] - memory[1] < 20.0, memory
    [template] = psutil.Process().children()
    assert template.children() == []


def test_a_heavy_closure_is_warned_about(cluster: rp.Cluster) -> None:
    heavy = torch.zeros(17 << 20)

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return cross_entropy(output, target) + heavy[0]

    with pytest.warns(UserWarning, match=r"loss takes 68 MiB to send: it refers to something large"):
        rp.Pipeline(mlp(), cluster, loss=loss, optimizer=sgd).close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=sgd).close()


def test_launch_works_off_the_main_thread() -> None:
    found: list[object] = []

    def elsewhere() -> None:
        with rp.launch(workers=1, threads=1) as cluster:
            found.append(cluster.call(1, os.getpid))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert len(found) == 1
