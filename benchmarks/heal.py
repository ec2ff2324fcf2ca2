"""What heal=True costs where nobody dies: steps of the same model, alternating with those of heal=False in one run.

Two drivers, each with its own workers, take turns; while one runs its steps the other's processes sleep. Median of the
paired ratios, and how far apart half of them lie. A third driver, with heal=False too, says what two equal ones give.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import statistics
import time
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
            times = []
            for _ in range(count):
                start = time.perf_counter()
                pipeline.train_step(*data)
                times.append(time.perf_counter() - start)
            pipe.send(times)


def measure(case: Case, dispatch: str, rounds: int, steps: int) -> dict[str, list[float]]:
    """Return each driver's median time of a step, by round."""
    context, pipes, processes = mp.get_context("spawn"), {}, []
    for name, heal in HEAL.items():
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=drive, args=(case, dispatch, heal, theirs), daemon=False))
        processes[-1].start()
    found: dict[str, list[float]] = {name: [] for name in HEAL}
    for turn in range(-1, rounds):
        for name in [*HEAL][:: 1 if turn % 2 else -1]:
            pipes[name].send(steps)
            seconds = statistics.median(pipes[name].recv())
            found[name] += [seconds] if turn >= 0 else []
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send(0)
        process.join(10)
    return found


def main() -> None:
    """Print a row for each size."""
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
    print(f"{'d':>4} | {'off':>7} {'on':>7} ms | on ÷ off, quartiles      | off again ÷ off, quartiles | on - off")
    for dim in args.dims:
        case = Case(dim, args.workers, args.chunks, args.schedule)
        found = measure(case, args.dispatch, args.rounds, args.steps)
        ms = {name: 1e3 * statistics.median(times) for name, times in found.items()}
        cells = []
        for name in ("on", "off again"):
            ratios = [a / b for a, b in zip(found[name], found["off"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            cells.append(f"{middle:6.3f} ({low:.3f} to {high:.3f})")
        more = statistics.median(1e3 * (a - b) for a, b in zip(found["on"], found["off"], strict=True))
        print(
            f"{dim:>4} | {ms['off']:7.2f} {ms['on']:7.2f}    | {cells[0]} | {cells[1]}   | {more:+.2f} ms", flush=True
        )
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
