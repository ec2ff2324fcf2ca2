"""Workers to be killed: ``python -m support.killed`` forks one per line that it reads, which trains until it dies.

The line names what is trained. The worker writes where its memory is, waits for a line, and then writes the number of
every step once it is done. What is forked has run nothing of torch, whose threads would not come along.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

import torch
import torch._dynamo  # which the first optimizer would import, in every child

from support import kinds


def train(kind: str) -> None:
    torch.set_num_threads(1)
    worker = kinds.solo(kind)
    kept_at = worker.actor.held.kept_at
    assert kept_at is not None
    print(*kept_at, flush=True)
    sys.stdin.readline()
    for step in range(1 << 20):
        worker.step(step)
        os.write(1, f"{step}\n".encode())  # whole or not at all


def main() -> None:
    while line := sys.stdin.readline():
        if (child := os.fork()) == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            train(line.strip())
        os.waitpid(child, 0)
        print("dead", flush=True)


if __name__ == "__main__":
    main()
