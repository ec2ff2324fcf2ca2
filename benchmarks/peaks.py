"""Memory predicted beside measured: two workers' peaks under every schedule, with and without recomputation and copy.

Of asynchronous schedules a stream of more than 64 updates, in which the second snapshot has followed the first.

Predicted: what ``rp.plan`` would say, from a profile of the layers in this process. Measured: on each worker the
resident memory's high-water mark (VmHWM) of a step, less the resident memory before the pipeline was made and after
another, small one was there. The heap's free pages are given back before the step, or the mark would be that of the
first steps, in which the optimizer makes its state. ``--threshold``: blocks of at least so many bytes are returned to
the system when they are free (MALLOC_MMAP_THRESHOLD_); a worker's heap keeps blocks of any size otherwise, and its
fragments count. USS: what is unique to a worker once the pipeline is made, and between two steps.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import nn

import rpcpipe as rp
from gpt_model import gpt, next_token_loss
from rpcpipe.pipeline.planning import cost_model
from rpcpipe.planning import CostModel
from rpcpipe.planning.cost_model import SIMPLEST, Candidate
from rpcpipe.planning.worker_memory import WorkerMemory
from rpcpipe.schedules.weight_versions import choose
from rpcpipe.stage.stream_rollback import EVERY

MIB = 2**20
_VOCABULARY, _CONTEXT = 1000, 128
_SCHEDULES = [
    "gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "pipedream", "pipedream/vertical_sync", "pipedream/latest",
    "pipedream-2bw",
]  # fmt: skip
_STREAMED = 2 * EVERY + 8  # updates


class Resident(NamedTuple):
    """Bytes of a process: unique to it, resident, and the most that was resident since ``restart``."""

    unique: int
    resident: int
    peak: int


def look() -> Resident:
    """Return this process's memory."""
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    info = psutil.Process().memory_full_info()
    return Resident(info.uss, info.rss, peak << 10)


def restart() -> Resident:
    """Give the heap's free pages back, and let the high-water mark begin anew."""
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return look()


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer."""
    return torch.optim.AdamW(params, lr=1e-4)


class Case(NamedTuple):
    """A model, and a batch."""

    layers: list[rp.LayerSpec]
    inputs: torch.Tensor
    targets: torch.Tensor


def case(dim: int, blocks: int, batch: int) -> Case:
    """A GPT: 8 blocks of d = 512 have 100 MiB of weights."""
    ids = torch.randint(0, _VOCABULARY, (batch, _CONTEXT + 1), generator=torch.Generator().manual_seed(0))
    return Case(gpt(_VOCABULARY, dim, 8, blocks, _CONTEXT), ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


class Way(NamedTuple):
    """How the model is run; ``weights``: the policy of an asynchronous schedule."""

    schedule: str
    weights: str | None
    checkpoint: str
    undo: str

    @property
    def by_batch(self) -> bool:
        """Whether an update follows a batch, and not a micro-batch, of a stream."""
        policy = choose(self.schedule, self.weights)
        return policy is not None and policy.by_batch


def ways(names: Sequence[str]) -> Iterator[Way]:
    """Yield every way to run the schedules ``names``; "pipedream/latest" is one with weights="latest"."""
    for name in names:
        schedule, _, weights = name.partition("/")
        undos = ("copy", "off") if schedule in SIMPLEST else ("copy",)
        for checkpoint, undo in itertools.product(("never", "always"), undos):
            yield Way(schedule, weights or None, checkpoint, undo)


def predict(costs: CostModel, way: Way, chunks: int, balance: Sequence[int]) -> tuple[WorkerMemory, ...]:
    """Return the workers' predicted memory."""
    (micro_batch,) = costs.sums
    candidate = Candidate(
        schedule=way.schedule, depth=2, replicas=1, virtual_stages=len(balance) // 2, micro_batch=micro_batch,
        chunks=2 if way.by_batch else chunks, checkpoint=way.checkpoint, undo=way.undo, weights=way.weights,
    )  # fmt: skip
    return costs.parts(candidate, [0, *accumulate(balance)])


def measure(cluster: rp.Cluster, what: Case, way: Way, chunks: int) -> tuple[list[int], list[dict[str, float]]]:
    """Return the cut, and each worker's bytes: of the pipeline as it is made, between two steps, and at the peak."""
    if way.by_batch:  # as many updates take fewer micro-batches
        part = 2 * len(what.inputs) // chunks
        what, chunks = Case(what.layers, what.inputs[:part], what.targets[:part]), 2
    small = case(8, 2, 4)
    first = rp.Pipeline(small.layers, cluster, loss=next_token_loss, optimizer=adamw, chunks=2)
    first.train_step(small.inputs, small.targets)
    first.close()
    before = [cluster.call(worker, restart) for worker in cluster.workers]
    pipe = rp.Pipeline(
        what.layers, cluster, loss=next_token_loss, optimizer=adamw, schedule=way.schedule, chunks=chunks,
        virtual_stages=rp.schedules.suited_virtual_stages(way.schedule, 2), checkpoint=way.checkpoint, undo=way.undo,
        weights=way.weights,
    )  # fmt: skip
    made = [cluster.call(worker, restart) for worker in cluster.workers]
    for _ in range(2):
        pipe.train_step(what.inputs, what.targets)
    idle = [cluster.call(worker, restart) for worker in cluster.workers]
    if way.schedule in SIMPLEST:
        pipe.train_step(what.inputs, what.targets)
    else:
        batches = _STREAMED if way.by_batch else -(-_STREAMED // chunks)
        for _ in pipe.train([(what.inputs, what.targets)] * batches):
            pass
    after = [cluster.call(worker, look) for worker in cluster.workers]
    balance = pipe.balance
    pipe.close()
    return balance, [
        {"made": m.unique - b.unique, "idle": i.unique - b.unique, "peak": a.peak - b.resident}
        for b, m, i, a in zip(before, made, idle, after, strict=True)
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--schedules", nargs="+", default=_SCHEDULES)
    parser.add_argument("--threshold", type=int, help="of the allocator, in bytes")
    parser.add_argument("--parts", action="store_true", help="of the prediction")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.threshold is not None:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(args.threshold)
    what = case(args.dim, args.blocks, args.batch)
    costs = cost_model(
        what.layers, what.inputs, 2, loss=next_token_loss, targets=what.targets, optimizer=adamw, chunks=[args.chunks]
    )
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}; MiB of worker 0 and worker 1")
    print("| schedule | checkpoint | undo | predicted | measured | predicted ÷ measured | USS made | USS idle |")
    print("|---|---|---|---|---|---|---|---|")
    for way in ways(args.schedules):
        with rp.launch(workers=2, threads=1) as cluster:
            balance, found = measure(cluster, what, way, args.chunks)
        foreseen = predict(costs, way, args.chunks, balance)
        columns = [
            [worker.total / MIB for worker in foreseen], [worker["peak"] / MIB for worker in found],
            [worker.total / own["peak"] for worker, own in zip(foreseen, found, strict=True)],
            [worker["made"] / MIB for worker in found], [worker["idle"] / MIB for worker in found],
        ]  # fmt: skip
        texts = [
            ", ".join(f"{value:.2f}" if at == 2 else f"{value:.0f}" for value in row) for at, row in enumerate(columns)
        ]
        print("| " + " | ".join(["/".join(filter(None, way[:2])), *way[2:], *texts]) + " |", flush=True)
        if args.parts:
            print(*foreseen, sep="\n", flush=True)


if __name__ == "__main__":
    main()
