"""What heal=True costs where nobody dies: steps of the same model, alternating with those of heal=False in one run.

Two drivers, each with its own workers, take turns; while one runs its steps the other's processes sleep. Median of the
paired ratios, and between which values half of them lie; of wall time, and of the processor time of driver and workers,
which others on the machine disturb less. A third driver, with heal=False too, says what two equal ones give.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from bench import Case, adamw, balance, batch, layers

import rpcpipe as rp
from gpt_model import next_token_loss

HEAL = {"off": False, "off again": False, "on": True}


def drive(case: Case, dispatch: str, heal: bool, pipe: Any) -> None:
    """Run the number of steps that ``pipe`` says, and answer with their times."""
    torch.set_num_threads(1)
    with rp.launch(case.workers, threads=1, heal=heal) as cluster:
        pipeline = rp.Pipeline(
            layers(case), cluster, loss=next_token_loss, optimizer=adamw, schedule=case.schedule, chunks=case.chunks,
            balance=balance(case), dispatch=dispatch,
        )  # fmt: skip
        data = batch(case, 0)
        while count := pipe.recv():
            before, times = _processor_seconds(cluster), []
            for _ in range(count):
                start = time.perf_counter()
                pipeline.train_step(*data)
                times.append(time.perf_counter() - start)
            pipe.send((statistics.median(times), (_processor_seconds(cluster) - before) / count))


def _processor_seconds(cluster: rp.Cluster) -> float:
    """Return the processor time of this process and of all workers; their threads live as long as they do."""
    pids = [os.getpid(), *(worker.pid for worker in cluster.workers)]
    threads = [thread for pid in pids for thread in Path(f"/proc/{pid}/task").iterdir()]
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) * 1e-9


def measure(case: Case, dispatch: str, rounds: int, steps: int) -> dict[str, list[tuple[float, float]]]:
    """Return each driver's wall time (median) and processor time (mean) of a step, by round."""
    context, pipes, processes = mp.get_context("spawn"), {}, []
    for name, heal in HEAL.items():
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=drive, args=(case, dispatch, heal, theirs)))
        processes[-1].start()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in HEAL}
    for turn in range(-1, rounds):
        for name in [*HEAL][:: 1 if turn % 2 else -1]:
            pipes[name].send(steps)
            seconds = pipes[name].recv()
            found[name] += [seconds] if turn >= 0 else []  # the first round warms up
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send(0)
        process.join(10)
    return found


def row(found: list[float], base: list[float]) -> str:
    """Return the median and the quartiles of the paired ratios, and the median difference."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(found, base, strict=True)], n=4)
    more = statistics.median(1e3 * (a - b) for a, b in zip(found, base, strict=True))
    return f"{middle:6.3f} ({low:.3f} to {high:.3f}) {more:+6.2f} ms"


def main() -> None:
    """Print four rows for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--schedule", default="1f1b")
    parser.add_argument("--dispatch", default="batched")
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, {args.dispatch}")
    for dim in args.dims:
        found = measure(Case(dim, args.workers, args.chunks, args.schedule), args.dispatch, args.rounds, args.steps)
        for index, what in enumerate(("wall", "processor")):
            times = {name: [seconds[index] for seconds in rounds] for name, rounds in found.items()}
            base = times.pop("off")
            for name, own in times.items():
                print(
                    f"d {dim:>3} {what:9} {1e3 * statistics.median(base):8.2f} ms off, {name:>9} ÷ off {row(own, base)}"
                )
        print(f"load {os.getloadavg()[0]:.1f}", flush=True)


if __name__ == "__main__":
    main()
