"""What asynchrony costs and what it brings: 1F1B beside PipeDream's weight policies on real text.

Each run sees the same samples in the same order; losses over samples go to one plot. Then the same
runs are timed, beside what the simulator makes of the measured durations.

python examples/pipedream.py --plot curves.svg        # needs matplotlib: pip install '.[plot]'
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import islice
from pathlib import Path

import rpcpipe as rp
from gpt import adamw, batches, read
from gpt_model import gpt, next_token_loss

# Name in the plot: schedule, weights.
RUNS: dict[str, tuple[str, str | None]] = {
    "1f1b": ("1f1b", None),
    "stash": ("pipedream", "stash"),
    "vertical sync": ("pipedream", "vertical_sync"),
    "latest": ("pipedream", "latest"),
    "2bw": ("pipedream-2bw", None),
}


def pipeline(cluster: rp.Cluster, name: str, args: argparse.Namespace) -> rp.Pipeline:
    """A fresh model under the run's schedule; ``args.chunks`` micro-batches a batch, the same for all."""
    schedule, weights = RUNS[name]
    return rp.Pipeline(
        gpt(256, args.dim, 4, 2 * args.workers, args.context),
        cluster,
        loss=next_token_loss,
        optimizer=adamw,
        schedule=schedule,
        weights=weights,
        chunks=args.chunks,
        clip_grad_norm=1.0,
    )


def curve(cluster: rp.Cluster, name: str, args: argparse.Namespace) -> list[float]:
    """The loss of every batch."""
    pipe = pipeline(cluster, name, args)
    data = islice(batches(read(None), args.batch, args.context), args.batches)
    losses = [result.loss for result in pipe.train(data)]
    pipe.close()
    return losses


def seconds_a_batch(cluster: rp.Cluster, name: str, args: argparse.Namespace) -> tuple[float, float]:
    """(measured, simulated): in the steady state, from the measured duration of each action."""
    pipe = pipeline(cluster, name, args)
    data = list(islice(batches(read(None), args.batch, args.context), 24))
    with pipe.trace() as timeline:
        for step, _ in enumerate(pipe.train(data)):
            if step == 3:
                start = time.perf_counter()
            if step == 15:  # results still come while the pipeline is full
                measured = (time.perf_counter() - start) / 12
    updates = [span.end - span.start for span in timeline.spans if span.kind == "U"]
    costs = rp.schedules.Costs.measured(timeline, args.workers)
    if pipe.schedule.asynchronous:
        long, short = (
            rp.schedules.streamed(pipe.schedule.name, args.workers, args.chunks, count).simulate(costs).makespan
            for count in (24, 12)
        )
        simulated = (long - short) / 12
    else:
        simulated = pipe.schedule.simulate(costs).makespan + statistics.median(updates)
    pipe.close()
    return measured, simulated


def plot(curves: dict[str, list[float]], path: Path, args: argparse.Namespace) -> None:
    """All losses over samples, each a mean over eight batches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for name, losses in curves.items():
        means = [statistics.mean(losses[at : at + 8]) for at in range(0, len(losses) - 7, 8)]
        axis.plot([(8 * index + 4) * args.batch for index in range(len(means))], means, label=name, linewidth=1)
    axis.set(xlabel="samples", ylabel="loss", title=f"{args.workers} stages, {args.chunks} micro-batches a batch")
    axis.legend()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    """Curves, then times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=160)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("--dim", type=int, default=96)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    with rp.launch(workers=args.workers) as cluster:
        curves = {name: curve(cluster, name, args) for name in RUNS}
        for name, losses in curves.items():
            print(f"{name:14} loss {statistics.mean(losses[-16:]):.3f} over the last 16 of {len(losses)} batches")
        if args.plot:
            plot(curves, args.plot, args)
        rounds = [{name: seconds_a_batch(cluster, name, args) for name in RUNS} for _ in range(args.rounds)]
    print(f"{'':14} {'ms a batch':>10} {'÷ 1f1b':>7} {'simulated':>9}")
    for name in RUNS if rounds else ():
        measured = statistics.median(of[name][0] for of in rounds)
        ratio = statistics.median(of[name][0] / of["1f1b"][0] for of in rounds)
        simulated = statistics.median(of[name][1] / of["1f1b"][1] for of in rounds)
        print(f"{name:14} {measured * 1e3:10.1f} {ratio:7.2f} {simulated:9.2f}")


if __name__ == "__main__":
    main()
