"""Workers that SIGKILL ends at any instant, and what their successors go on from."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rpcpipe.cluster.kept_descriptor import KeptDescriptor
from support.kinds import KINDS, solo
from support.solo import Solo

TESTS = Path(__file__).parent.parent
KILLS = 10
LAST_STEP = 40


@pytest.fixture(scope="module")
def parent() -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    command = [sys.executable, "-m", "support.killed"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def told(parent: subprocess.Popen[str]) -> str:
    """The next line that the worker writes."""
    assert parent.stdout is not None
    return parent.stdout.readline().strip()


def killed(parent: subprocess.Popen[str], kind: str, draw: random.Random) -> tuple[KeptDescriptor, int]:
    """A worker's memory, and the last step that it has told of before it was killed, or -1."""
    assert parent.stdin is not None
    assert parent.stdout is not None
    print(kind, file=parent.stdin, flush=True)
    pid, descriptor = map(int, told(parent).split())
    keeper = KeptDescriptor(pid, descriptor)
    print(file=parent.stdin, flush=True)
    last = -1
    for _ in range(draw.randrange(LAST_STEP)):
        last = int(told(parent))
    select.select([parent.stdout], [], [], draw.random() * 0.01)  # until it tells of another, or before
    os.kill(pid, signal.SIGKILL)
    while (line := told(parent)) != "dead":
        last = int(line)
    return keeper, last


@pytest.mark.parametrize("kind", KINDS)
def test_a_successor_has_what_the_worker_told_of_to_the_bit(parent: subprocess.Popen[str], kind: str) -> None:
    draw = random.Random(kind)
    never_killed = solo(kind)
    states = {-1: never_killed.state(attributes=False)}
    for step in range(LAST_STEP + 40):
        never_killed.step(step)
        states[step] = never_killed.state(attributes=False)
    for _ in range(KILLS):
        keeper, last = killed(parent, kind, draw)
        head = keeper.look()
        assert head.step in (last, last + 1)
        successor = Solo.revived(keeper.path)
        keeper.close()
        successor.roll_back(last + 1)
        assert successor.state(attributes=False) == states[last]
        successor.step(last + 1)
        assert successor.state(attributes=False) == states[last + 1]
