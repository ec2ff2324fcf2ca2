"""Trains a GPT while a worker is killed every second, and once more undisturbed: the weights are the same.

python examples/immortal.py --every 0.5 --steps 200    # immortal.svg shows the time around the first kill
"""

from __future__ import annotations

import argparse
import math
import os
import random
import signal
import threading
import time
from contextlib import suppress
from itertools import islice

import torch

import rpcpipe as rp
from gpt import adamw, batches, read
from gpt_model import gpt, next_token_loss


def kill(cluster: rp.Cluster, kills: list[float]) -> None:
    """Kill one of the workers and add the time to ``kills``, unless it has died already and is being replaced."""
    now = time.monotonic()
    with suppress(ProcessLookupError):
        os.kill(random.choice(cluster.workers).pid, signal.SIGKILL)
        kills.append(now)


def train(cluster: rp.Cluster, kills: list[float], every: float) -> tuple[rp.Pipeline, rp.schedules.Timeline]:
    """Train; fill ``kills`` with the times at which a worker was killed; return the pipeline and its timeline."""
    begun, shown, last = time.time(), len(cluster.events), time.monotonic()
    timers: list[threading.Timer] = []
    pipe = rp.Pipeline(gpt(256, args.dim, 4, 4, 64), cluster, loss=next_token_loss, optimizer=adamw, chunks=4)
    with pipe.trace() as timeline:
        for result in pipe.train(islice(batches(read(None), 16, 64), args.steps)):
            for event in cluster.events[shown:]:
                took = "" if event.seconds is None else f", within {event.seconds:.2f} s, by process {event.pid}"
                print(f"{event.time - begun:6.2f} s  {event.worker} {event.kind}{took}: {event.how}")
            shown = len(cluster.events)
            print(f"{time.time() - begun:6.2f} s  step {result.step}: loss {result.loss:.6f}", flush=True)
            if time.monotonic() > last + every:
                last = time.monotonic()
                # Some time in the next step.
                timers.append(threading.Timer(random.random() * result.seconds, kill, (cluster, kills)))
                timers[-1].start()
    for timer in timers:  # none kills in the run after this one
        timer.cancel()
        timer.join()
    return pipe, timeline


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=float, default=1.0, help="seconds between two kills")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--picture", default="immortal.svg")
    args, kills = parser.parse_args(), list[float]()
    with rp.launch(workers=2, threads=1) as cluster:
        killed, timeline = train(cluster, kills, args.every)
        undisturbed, _ = train(cluster, [], math.inf)
        weights, expected = killed.state_dict(), undisturbed.state_dict()
    if kills:
        spans = [span for span in timeline.spans if kills[0] - 0.5 < span.start < kills[0] + 0.5]
        rp.schedules.Timeline(spans, workers=2, name=f"around the first of {len(kills)} kills").save(args.picture)
    same = all(torch.equal(weights[name], value) for name, value in expected.items())
    print(f"{len(kills)} kills; same weights as the undisturbed run: {'yes' if same else 'no'}")
