"""Plans a GPT's training on this machine, runs every schedule, and shows what was predicted beside what was measured.

python examples/plan.py --workers 2
python examples/plan.py --workers 2 --best      # only the plan, and the run of it
"""

from __future__ import annotations

import argparse
import statistics
from itertools import islice
from typing import Any

import rpcpipe as rp
from gpt import adamw, batches, read
from gpt_model import gpt, next_token_loss
from rpcpipe.planning.cost_model import SIMPLEST


def run(cluster: rp.Cluster, model: list[rp.LayerSpec], plan: rp.planning.Plan, data: list[Any], rounds: int) -> float:
    """Median seconds of a step under ``plan``, the first two apart."""
    pipe = rp.Pipeline(model, cluster, loss=next_token_loss, optimizer=adamw, plan=plan)
    seconds = [pipe.train_step(x, y).seconds for x, y in islice(data, rounds + 2)]
    pipe.close()
    return statistics.median(seconds[2:])


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--best", action="store_true")
    args = parser.parse_args()
    data = [(x.clone(), y.clone()) for x, y in islice(batches(read(None), args.batch, args.context), args.rounds + 2)]
    model = gpt(256, args.dim, 4, args.blocks, args.context)
    with rp.launch(workers=args.workers, threads=1) as cluster:
        x, y = data[0]
        settings: dict[str, Any] = {"loss": next_token_loss, "targets": y, "optimizer": adamw}
        if args.best:
            plan = rp.plan(model, x, cluster, **settings)
            print(plan)
            print(f"measured: {run(cluster, model, plan, data, args.rounds):.4g} s a step")
            return
        print("| schedule | predicted, ms | measured, ms | measured ÷ predicted |")
        print("|---|---|---|---|")
        for name in SIMPLEST:
            plan = rp.plan(model, x, cluster, chunks=[args.chunks], schedules=[name], checkpoints=["never"], **settings)
            seconds = run(cluster, model, plan, data, args.rounds)
            print(f"| {name} | {plan.seconds * 1e3:.0f} | {seconds * 1e3:.0f} | {seconds / plan.seconds:.2f} |")


if __name__ == "__main__":
    main()
