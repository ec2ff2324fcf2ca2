"""A hop: from the end of a stage's forward to the start of the next stage's, and an empty step.

Two workers that are idle otherwise, one micro-batch, tensors of a given size between the stages; measured by the
workers' own clock, which processes of one host share. An empty step is one of tiny layers and four micro-batches.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time

import psutil
import torch
from torch import nn

import rpcpipe as rp


class Scaled(nn.Module):
    """Gives its input times a parameter: next to no work, whatever the size."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def mean(output: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """The loss."""
    return output.mean()


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer."""
    return torch.optim.SGD(params, lr=1e-6)


def pipeline(cluster: rp.Cluster, schedule: str, chunks: int, dispatch: str) -> rp.Pipeline:
    """Return a pipeline of two stages."""
    layers = [Scaled(), Scaled()]
    return rp.Pipeline(
        layers, cluster, loss=mean, optimizer=sgd, schedule=schedule, chunks=chunks, balance=[1, 1], dispatch=dispatch
    )


def hop(cluster: rp.Cluster, kib: int, steps: int) -> tuple[float, float]:
    """Return the median seconds of a hop forward and of one back."""
    pipe = pipeline(cluster, "naive", 1, "batched")
    x, y = torch.randn(1, kib * 256), torch.zeros(1)
    forward, back = [], []
    for _ in range(steps):
        spans = {(span.kind, span.stage): span for span in pipe.train_step(x, y).timeline.spans}
        forward.append(spans["F", 1].start - spans["F", 0].end)
        back.append(spans["B", 0].start - spans["B", 1].end)
    pipe.close()
    return statistics.median(forward[10:]), statistics.median(back[10:])


def empty_step(cluster: rp.Cluster, dispatch: str, steps: int) -> tuple[float, float, float]:
    """Return the median seconds of a step, and the CPU seconds per step of the driver and of a worker."""
    pipe = pipeline(cluster, "1f1b", 4, dispatch)
    x, y = torch.randn(4, 8), torch.zeros(4)
    for _ in range(10):
        pipe.train_step(x, y)
    processes = [psutil.Process(), psutil.Process(cluster.workers[0].pid)]
    before = [sum(process.cpu_times()[:2]) for process in processes]
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        pipe.train_step(x, y)
        times.append(time.perf_counter() - start)
    driver, worker = (sum(process.cpu_times()[:2]) - old for process, old in zip(processes, before, strict=True))
    pipe.close()
    return statistics.median(times), driver / steps, worker / steps


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kib", type=int, nargs="+", default=[1, 256, 1024])
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    cluster = rp.launch(workers=2, threads=1)
    for kib in args.kib:
        forward, back = hop(cluster, kib, args.steps)
        print(f"a hop of {kib:5} KiB: forward {1e3 * forward:.3f} ms, back {1e3 * back:.3f} ms")
    for dispatch in ("rref", "batched"):
        step, driver, worker = empty_step(cluster, dispatch, args.steps)
        print(
            f"an empty step, {dispatch:>7}: {1e3 * step:.2f} ms; CPU per step: driver {1e3 * driver:.2f} ms,"
            f" a worker {1e3 * worker:.2f} ms"
        )


if __name__ == "__main__":
    main()
