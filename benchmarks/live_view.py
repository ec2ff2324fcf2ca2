"""What rp.view costs: steps of one pipeline without a view, with one that nobody looks at, and with a client.

The states take turns, in one run, and "off again" says what two equal ones give. The client is a process of its own
that reads every message and draws nothing: a browser on the same machine costs its own share on top. Median of the
paired ratios of the steps' wall times, and between which values half of them lie. Others on the machine disturb less
the processor time of the view's thread, as a share of the time that it was open, that of what the driver does after a
step, and that of a message.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from bench import Case, adamw, balance, batch, layers

import rpcpipe as rp
from gpt_model import next_token_loss
from rpcpipe.view.recorder import Recorder
from rpcpipe.view.source import message

STATES = ("off", "off again", "open", "watched")
READS = """
import sys, urllib.request
with urllib.request.urlopen(sys.argv[1]) as stream:
    for line in stream:
        print(len(line), flush=True)
"""


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


def thread_seconds() -> float:
    """Return the processor time of the view's thread so far, 0 without one."""
    threads = [one.native_id for one in threading.enumerate() if one.name == "rpcpipe-view"]
    times = [Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[0] for thread in threads]
    return sum(map(int, times)) * 1e-9


def work(pipe: rp.Pipeline, result: rp.StepResult, calls: int = 50) -> tuple[float, float]:
    """Return the processor seconds that noting a step takes, and making a message with its timelines."""
    recorder, noting, making = Recorder(pipe), 0.0, 0.0
    for _ in range(calls):
        begun = time.thread_time()
        recorder.add(result)
        noted = time.thread_time()
        message(recorder)
        noting, making = noting + noted - begun, making + time.thread_time() - noted
    return noting / calls, making / calls


def measure(case: Case, rounds: int, steps: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return by state each round's median seconds of a step, and the share of a core that the view's thread took."""
    times: dict[str, list[float]] = {name: [] for name in STATES}
    shares: dict[str, list[float]] = {name: [] for name in STATES}
    with rp.launch(case.workers, threads=1) as cluster:
        pipe = rp.Pipeline(
            layers(case), cluster, loss=next_token_loss, optimizer=adamw, schedule=case.schedule, chunks=case.chunks,
            balance=balance(case), dispatch="batched",
        )  # fmt: skip
        data = batch(case, 0)
        for turn in range(-1, rounds):
            for name in STATES[:: 1 if turn % 2 else -1]:
                with state(name, pipe):
                    used, begun, own = thread_seconds(), time.perf_counter(), list[float]()
                    for _ in range(steps):
                        start = time.perf_counter()
                        pipe.train_step(*data)
                        own.append(time.perf_counter() - start)
                    share = (thread_seconds() - used) / (time.perf_counter() - begun)
                if turn >= 0:  # the first round warms up
                    times[name].append(statistics.median(own))
                    shares[name].append(share)
        noting, making = work(pipe, pipe.train_step(*data))
        print(f"d {case.dim:>3} noting a step takes {1e6 * noting:.0f} µs, making a message {1e3 * making:.2f} ms")
    return times, shares


def main() -> None:
    """Print three rows for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--schedule", default="1f1b")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    for dim in args.dims:
        times, shares = measure(Case(dim, args.workers, args.chunks, args.schedule), args.rounds, args.steps)
        for name in STATES[1:]:
            ratios = [one / base for one, base in zip(times[name], times["off"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(
                f"d {dim:>3} {1e3 * statistics.median(times['off']):8.2f} ms off, {name:>9} ÷ off {middle:.3f}"
                f" ({low:.3f} to {high:.3f}), the view's thread {statistics.mean(shares[name]):.3%} of a core"
            )
        print(f"load {os.getloadavg()[0]:.1f}", flush=True)


if __name__ == "__main__":
    main()
