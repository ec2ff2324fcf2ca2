"""What rp.view costs, in processor time: without a view, with one that nobody looks at, and with a client that reads.

Wall times on a machine with other work are too scattered to show 1 %. Processor times are less so, and what the view
does itself is measured apart from all the rest: the callback on the driver's thread by that thread's clock, around
each call, and the view's thread by its own. Workers get no message of a view (tests/view/test_server.py).

The states take turns, in one run, and "off again" says what two equal ones give. A state's processor time per step is
that of driver and workers together. The client is a process of its own that reads every message and draws nothing; it
is not counted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from bench import Case, adamw, balance, batch, layers

import rpcpipe as rp
from gpt_model import next_token_loss
from rpcpipe.view.recorder import Recorder

STATES = ("off", "off again", "open", "watched")
READS = """
import sys, urllib.request
with urllib.request.urlopen(sys.argv[1]) as stream:
    for line in stream:
        print(len(line), flush=True)
"""


class Used(NamedTuple):
    """Processor seconds of driver, workers, callback and the view's thread, wall seconds, and steps."""

    driver: float
    workers: float
    callback: float
    thread: float
    wall: float
    steps: int

    @classmethod
    def between(cls, before: Sequence[float], after: Sequence[float], steps: int) -> Used:
        """Return what was used between two calls of ``Clocks.read``."""
        driver, workers, callback, thread, wall = (end - start for start, end in zip(before, after, strict=True))
        return cls(driver, workers, callback, thread, wall, steps)

    @property
    def total(self) -> float:
        """Processor seconds of a step, of all processes."""
        return (self.driver + self.workers) / self.steps

    @property
    def own(self) -> tuple[float, float]:
        """Those of the view itself: its callback and its thread."""
        return self.callback / self.steps, self.thread / self.steps


class Clocks:
    """Reads the processor time of this process, of ``workers``, and of the view in it."""

    def __init__(self, workers: Sequence[int]) -> None:
        self._clocks = [(~pid << 3) | 2 for pid in workers]  # as clock_getcpuclockid(3)
        self.callback = 0.0
        add = Recorder.add

        def timed(recorder: Recorder, result: rp.StepResult) -> None:
            begun = time.thread_time()
            add(recorder, result)
            self.callback += time.thread_time() - begun

        mock.patch.object(Recorder, "add", timed).start()

    def read(self) -> tuple[float, float, float, float, float]:
        """Return the first five fields of ``Used``, counted from some time on."""
        workers = sum(map(time.clock_gettime, self._clocks))
        return time.process_time(), workers, self.callback, thread_seconds(), time.perf_counter()


def thread_seconds() -> float:
    """Return the processor time of the view's thread so far, 0 without one."""
    threads = [one.native_id for one in threading.enumerate() if one.name == "rpcpipe-view"]
    times = [Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[0] for thread in threads]
    return sum(map(int, times)) * 1e-9


@contextmanager
def state(name: str, pipe: rp.Pipeline) -> Iterator[None]:
    """Have a view, and a client that has got its first message, as the state says."""
    if name.startswith("off"):
        yield
        return
    with rp.view(pipe) as view:
        if name == "open":
            yield
            return
        url = view.url.replace("/?", "/events?")
        client = subprocess.Popen([sys.executable, "-c", READS, url], stdout=subprocess.PIPE)
        try:
            assert client.stdout is not None
            client.stdout.readline()
            yield
        finally:
            client.kill()
            client.communicate()


def measure(case: Case, rounds: int, steps: int) -> dict[str, list[Used]]:
    """Return by state what each round's steps used."""
    used: dict[str, list[Used]] = {name: [] for name in STATES}
    with rp.launch(case.workers, threads=1) as cluster:
        pipe = rp.Pipeline(
            layers(case), cluster, loss=next_token_loss, optimizer=adamw, schedule=case.schedule, chunks=case.chunks,
            balance=balance(case), dispatch="batched",
        )  # fmt: skip
        data, clocks = batch(case, 0), Clocks([worker.pid for worker in cluster.workers])
        for turn in range(-1, rounds):
            for name in STATES[:: 1 if turn % 2 else -1]:
                with state(name, pipe):
                    before = clocks.read()
                    for _ in range(steps):
                        pipe.train_step(*data)
                    found = Used.between(before, clocks.read(), steps)
                if turn >= 0:  # the first round warms up
                    used[name].append(found)
    return used


def report(dim: int, used: dict[str, list[Used]]) -> None:
    """Print a row for "off" and one for each other state."""
    off = used["off"]
    total, wall = (statistics.median(found) for found in ([o.total for o in off], [o.wall / o.steps for o in off]))
    driver = statistics.median(one.driver / one.total / one.steps for one in off)
    print(f"d {dim:>3} off: {1e3 * wall:.1f} ms a step, {1e3 * total:.1f} ms of processors, {driver:.0%} in the driver")
    for name in STATES[1:]:
        ratios = [one.total / base.total for one, base in zip(used[name], off, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        callback, thread = (statistics.median(part) for part in zip(*(one.own for one in used[name]), strict=True))
        print(
            f"d {dim:>3} {name:>9} ÷ off {middle:.3f} ({low:.3f} to {high:.3f}); the view itself"
            f" {1e6 * callback:.0f} µs in the driver's thread and {1e6 * thread:.0f} in its own, a step,"
            f" {(callback + thread) / total:.3%}"
        )


def main() -> None:
    """Print four rows for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--schedule", default="1f1b")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    for dim in args.dims:
        report(dim, measure(Case(dim, args.workers, args.chunks, args.schedule), args.rounds, args.steps))
        print(f"load {os.getloadavg()[0]:.1f}", flush=True)


if __name__ == "__main__":
    main()
