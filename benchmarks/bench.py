"""rpcpipe beside torch.distributed.pipelining: same model, threads and batch, alternating in one run.

Both sides keep their processes alive; while one runs its steps the other's processes sleep. Times
are the wall times of whole training steps, from the driver on our side and from rank 0 (after a
barrier) on torch's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing as mp
import os
import platform
import socket
import statistics
import time
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import rpcpipe as rp
from gpt_model import gpt, next_token_loss

# What torch.distributed.pipelining calls the schedules that it has as well.
TORCHS = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved": "ScheduleInterleaved1F1B",
    "zb-v": "ScheduleZBVZeroBubble",
    "dualpipe-v": "ScheduleDualPipeV",
}
VOCABULARY, TIME, MICRO = 256, 128, 2


class Case(NamedTuple):
    """One row of the table."""

    dim: int
    workers: int
    chunks: int
    schedule: str
    device: str = "cpu"

    @property
    def beside_torch(self) -> bool:
        """Whether torch's side runs: gloo sends no CUDA tensors, and NCCL takes no two ranks of one GPU."""
        return self.schedule in TORCHS and self.device == "cpu"

    @property
    def virtual(self) -> int:
        """Stages per worker."""
        return rp.schedules.fewest_virtual_stages(self.schedule)


def layers(case: Case) -> list[rp.LayerSpec]:
    """The GPT, two blocks a worker."""
    return gpt(VOCABULARY, case.dim, case.dim // 64, 2 * case.workers, TIME)


def balance(case: Case) -> list[int]:
    """Two blocks a worker; the embedding goes to the first stage, the head to the last."""
    sizes = [2 // case.virtual] * (case.workers * case.virtual)
    sizes[0] += 1
    sizes[-1] += 1
    return sizes


def batch(case: Case, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens and the next ones."""
    ids = torch.randint(0, VOCABULARY, (MICRO * case.chunks, TIME + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The same optimizer on every side."""
    return torch.optim.AdamW(params, lr=1e-4)


def torch_rank(rank: int, case: Case, port: int, pipe: Any) -> None:
    """One rank of torch's side; runs the number of steps it is told and answers with their times."""
    import torch.distributed as dist
    from torch.distributed import pipelining

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=case.workers)
    sizes, specs = balance(case), layers(case)
    placement = rp.schedules.get(case.schedule, case.workers, case.chunks, case.virtual).placement
    mine = [stage for stage, holder in enumerate(placement) if holder == rank]
    modules = [
        nn.Sequential(*[spec.build() for spec in specs[sum(sizes[:stage]) : sum(sizes[: stage + 1])]]) for stage in mine
    ]
    stages = [
        pipelining.PipelineStage(module, stage, len(placement), torch.device("cpu"))
        for stage, module in zip(mine, modules, strict=True)
    ]
    kind: Any = getattr(pipelining.schedules, TORCHS[case.schedule])
    schedule = kind(stages if case.virtual > 1 else stages[0], case.chunks, loss_fn=next_token_loss)
    optimizer = adamw([parameter for module in modules for parameter in module.parameters()])
    last = placement[-1]
    inputs, targets = batch(case, 0)
    while count := pipe.recv():
        times = []
        for _ in range(count):
            dist.barrier()
            start = time.perf_counter()
            losses: list[torch.Tensor] = []
            first_args = (inputs,) if rank == 0 else ()
            if rank == last:
                schedule.step(*first_args, target=targets, losses=losses)
            else:
                schedule.step(*first_args)
            optimizer.step()
            optimizer.zero_grad()
            dist.barrier()
            times.append(time.perf_counter() - start)
        pipe.send(times)
    dist.destroy_process_group()


class TorchSide:
    """torch.distributed.pipelining's ranks."""

    def __init__(self, case: Case) -> None:
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = mp.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(case.workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=torch_rank, args=(rank, case, port, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def steps(self, count: int) -> list[float]:
        for pipe in self._pipes:
            pipe.send(count)
        times: list[list[float]] = [pipe.recv() for pipe in self._pipes]
        return times[0]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(0)
        for process in self._processes:
            process.join(10)


class OurSide:
    """An rpcpipe pipeline on a cluster that our other sides share. ``ahead`` is for ``train``."""

    def __init__(self, case: Case, cluster: rp.Cluster, dispatch: str, ahead: int = 0) -> None:
        self._ahead = ahead
        self._batch = batch(case, 0)
        self._pipe = rp.Pipeline(
            layers(case),
            cluster,
            loss=next_token_loss,
            optimizer=adamw,
            schedule=case.schedule,
            chunks=case.chunks,
            balance=balance(case),
            virtual_stages=case.virtual,
            dispatch=dispatch,
        )
        self.to_ideal: list[float] = []

    def steps(self, count: int) -> list[float]:
        times, start = [], time.perf_counter()
        for result in self._pipe.train([self._batch] * count, ahead=self._ahead):
            times.append(time.perf_counter() - start)
            start += times[-1]
            costs = rp.schedules.Costs.measured(result.timeline, len(self._pipe.stages))
            self.to_ideal.append(result.timeline.makespan / self._pipe.schedule.simulate(costs).makespan)
        return times

    def close(self) -> None:
        self._pipe.close()


class SingleProcess:
    """The whole model in this process, with the same one thread."""

    def __init__(self, case: Case) -> None:
        self._device = torch.device(case.device)
        self._model = nn.Sequential(*[spec.build() for spec in layers(case)]).to(self._device)
        self._optimizer = adamw(list(self._model.parameters()))
        self._inputs, self._targets = batch(case, 0)
        self._chunks = case.chunks

    def steps(self, count: int) -> list[float]:
        times = []
        for _ in range(count):
            start = time.perf_counter()
            for x, y in zip(self._inputs.chunk(self._chunks), self._targets.chunk(self._chunks), strict=True):
                loss = next_token_loss(self._model(x.to(self._device)), y.to(self._device))
                (loss / self._chunks).backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            self._optimizer.zero_grad()
            if self._device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return times

    def close(self) -> None:
        pass


def measure(case: Case, rounds: int, steps: int) -> dict[str, Any]:
    """Medians over all steps, and the median over rounds of the paired ratios to torch."""
    torch.set_num_threads(1)
    cluster = rp.launch(workers=case.workers, threads=1, device=case.device)
    sides: dict[str, Any] = {
        **({"torch": TorchSide(case)} if case.beside_torch else {}),
        "rref": OurSide(case, cluster, "rref"),
        "batched": OurSide(case, cluster, "batched"),
        "ahead": OurSide(case, cluster, "batched", ahead=1),
        "single": SingleProcess(case),
    }
    found: dict[str, list[list[float]]] = {name: [] for name in sides}
    for side in sides.values():
        side.steps(2)
    order = list(sides)
    for turn in range(rounds):
        for name in order if turn % 2 else order[::-1]:
            found[name].append(sides[name].steps(1 if name == "single" else steps))
    for side in sides.values():
        side.close()
    paired = {
        name: statistics.median(
            statistics.median(a) / statistics.median(b) for a, b in zip(found[name], found["torch"], strict=True)
        )
        for name in sides
        if "torch" in found
    }
    ideal = {name: statistics.median(sides[name].to_ideal) for name in ("rref", "batched", "ahead")}
    medians = {name: statistics.median(t for turn in turns for t in turn) for name, turns in found.items()}
    return {**case._asdict(), "seconds": medians, "ratio_to_torch": paired, "compute_to_ideal": ideal}


def main() -> None:
    """Print the table; with ``--json`` write all figures to a file as well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dims", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--chunks", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--schedules", nargs="+", default=["gpipe", "1f1b"])
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: the workers' GPUs, beside one process alone")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all figures to this file as well")
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(
        f"{'d':>4} {'K':>2} {'M':>3} {'schedule':>11} |"
        f" {'torch':>7} {'rref':>7} {'batched':>7} {'ahead':>7} {'single':>7} ms"
        f" | {'rref':>6} {'batched':>7} {'ahead':>6} of torch | {'rref':>6} {'batched':>7} {'ahead':>6} of ideal"
    )
    rows = []
    cases = [
        Case(d, k, m, s, args.device)
        for d, k, m, s in itertools.product(args.dims, args.workers, args.chunks, args.schedules)
    ]
    for case in cases:
        row = measure(case, args.rounds, args.steps)
        rows.append(row)
        ms = {name: 1e3 * value for name, value in row["seconds"].items()}
        ratio, ideal = row["ratio_to_torch"], row["compute_to_ideal"]
        nan = float("nan")
        print(
            f"{case.dim:>4} {case.workers:>2} {case.chunks:>3} {case.schedule:>11} | {ms.get('torch', nan):7.1f}"
            f" {ms['rref']:7.1f} {ms['batched']:7.1f} {ms['ahead']:7.1f} {ms['single']:7.1f}    |"
            f" {ratio.get('rref', nan):6.3f} {ratio.get('batched', nan):7.3f} {ratio.get('ahead', nan):6.3f}          |"
            f" {ideal['rref']:6.3f} {ideal['batched']:7.3f} {ideal['ahead']:6.3f}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps({"cores": os.cpu_count(), "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
