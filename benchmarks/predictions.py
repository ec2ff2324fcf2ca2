"""Predicted beside measured: a step's time under every synchronous schedule, in alternating rounds on one cluster.

In every round the layers and the cluster are measured anew, as ``rp.plan`` does it, and every schedule runs a step, so
that a machine that is slower for a while is so for both. What other processes disturbed is repeated, a few times at
most. The table holds medians over the rounds.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import psutil
import torch
from torch import nn

import rpcpipe as rp
from gpt_model import gpt, next_token_loss
from rpcpipe.pipeline.planning import cost_model
from rpcpipe.planning import CostModel, Plan, Search
from rpcpipe.planning.cost_model import SIMPLEST
from rpcpipe.planning.plan import decide

_VOCABULARY, _CONTEXT = 256, 64
_TRIES, _DISTURBED = 4, 0.03  # the share of the machine that others may take

T = TypeVar("T")


class Case(NamedTuple):
    """A model, a batch and a loss."""

    layers: list[rp.LayerSpec]
    inputs: torch.Tensor
    targets: torch.Tensor
    loss: Callable[[Any, Any], Any]


class Round(NamedTuple):
    """Seconds of a step, in one round, and the share of the machine that other processes took meanwhile."""

    predicted: float
    measured: float
    others: float


def undisturbed(run: Callable[[], T]) -> tuple[T, float]:
    """Return ``run``'s result and the share of the machine that others took, of the least disturbed of a few tries."""
    found: list[tuple[T, float]] = []
    while len(found) < _TRIES and (not found or found[-1][1] > _DISTURBED):
        machine, own, start = _machine_seconds(), _own_seconds(), time.perf_counter()
        result = run()
        others = _machine_seconds() - machine - (_own_seconds() - own)
        found.append((result, others / (time.perf_counter() - start) / (os.cpu_count() or 1)))
    return min(found, key=lambda pair: pair[1])


def _machine_seconds() -> float:
    """Seconds that all cores have worked."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - times.iowait - times.guest - times.guest_nice


def _own_seconds() -> float:
    """Seconds that this process and its children have worked."""
    here = psutil.Process()
    each = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return sum(times.user + times.system for times in each)


def case(name: str, dim: int, batch: int) -> Case:
    """The demo's GPT of 8 blocks, or 8 linear layers with GELUs between them."""
    generator = torch.Generator().manual_seed(0)
    if name == "gpt":
        ids = torch.randint(0, _VOCABULARY, (batch, _CONTEXT + 1), generator=generator)
        layers = gpt(_VOCABULARY, dim, 4, 8, _CONTEXT)
        return Case(layers, ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), next_token_loss)
    layers = [rp.LayerSpec(nn.Linear, dim, dim)]
    for _ in range(7):
        layers += [rp.LayerSpec(nn.GELU), rp.LayerSpec(nn.Linear, dim, dim)]
    x, y = (torch.randn(batch, dim, generator=generator) for _ in range(2))
    return Case(layers, x, y, nn.functional.mse_loss)


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer."""
    return torch.optim.AdamW(params, lr=1e-4)


def measure(cluster: rp.Cluster, what: Case, names: list[str], chunks: int, rounds: int) -> dict[str, list[Round]]:
    """Return the rounds by schedule; the order of the schedules alternates."""

    def costs() -> CostModel:
        return cost_model(
            what.layers, what.inputs, cluster, loss=what.loss, targets=what.targets, optimizer=adamw, chunks=[chunks]
        )

    first, _ = undisturbed(costs)
    plans = {name: decide(Search(first, len(what.inputs), [name], checkpoints=["never"])) for name in names}
    pipes = {
        name: rp.Pipeline(what.layers, cluster, loss=what.loss, optimizer=adamw, plan=plan)
        for name, plan in plans.items()
    }
    found: dict[str, list[Round]] = {name: [] for name in names}
    for pipe in pipes.values():
        pipe.train_step(what.inputs, what.targets)
    for turn in range(rounds):
        now, noise = undisturbed(costs)
        for name in names if turn % 2 else names[::-1]:
            seconds, more = undisturbed(lambda: pipes[name].train_step(what.inputs, what.targets).seconds)  # noqa: B023
            found[name].append(Round(predicted(now, plans[name]), seconds, max(noise, more)))
    return found


def predicted(costs: CostModel, plan: Plan) -> float:
    """Return the seconds of a step under ``plan`` with other ``costs``."""
    return costs.estimate(plan.best.candidate, plan.balance).seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=["gpt", "mlp"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--dim", type=int, help="256 for the GPT, 1024 for the MLP, unless given")
    parser.add_argument("--batch", type=int, help="32 for the GPT, 512 for the MLP, unless given")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--schedules", nargs="+", choices=SIMPLEST, default=list(SIMPLEST))
    args = parser.parse_args()
    dim, batch = (256, 32) if args.model == "gpt" else (1024, 512)
    what = case(args.model, args.dim or dim, args.batch or batch)
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    with rp.launch(workers=args.workers, threads=1) as cluster:
        found = measure(cluster, what, args.schedules, args.chunks, args.rounds)
    print("| schedule | predicted, ms | measured, ms | predicted ÷ measured | by others |")
    print("|---|---|---|---|---|")
    for name, rounds in found.items():
        foreseen, seconds, share = (
            statistics.median(values)
            for values in (
                [one.predicted for one in rounds],
                [one.measured for one in rounds],
                [one.predicted / one.measured for one in rounds],
            )
        )
        others = statistics.median(one.others for one in rounds)
        print(f"| {name} | {foreseen * 1e3:.0f} | {seconds * 1e3:.0f} | {share:.2f} | {others:.1%} |")


if __name__ == "__main__":
    main()
