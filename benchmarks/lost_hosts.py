"""Kill agents of ranks, each with its worker and all that it held, in a run that must have the bits of one without.

Three ranks and a spare on this host, each with an agent of its own that dies as a host does: nothing of its memory is
left. Whoever was killed is started again, and joins as the next spare. "action": from the kill to the first action of
the first training step whose actions all began after it: the death is noticed, the spare takes the place, all workers
go back to their snapshots, the steps since are done again, and the step under way is made again.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import rpcpipe as rp
from rpcpipe import _tables
from support import immortal
from support.immortal import Run
from support.ranks import Ranks, ranks

_PATIENCE = 60.0


class Killer:
    """Kills ranks of a run, one at a time, and notes what came of it."""

    def __init__(self, group: Ranks, cluster: rp.Cluster, seed: int) -> None:
        self.kills: list[float] = []
        self.actions: list[float] = []
        self._group, self._cluster, self.random = group, cluster, random.Random(seed)

    def told(self, result: rp.StepResult) -> None:
        """Note the first action after a kill was healed: an agent's worker outlives it by a moment."""
        used = sum(event.kind == "spare used" for event in self._cluster.events)
        if len(self.actions) < used:
            self.actions.append(min(span.start for span in result.timeline.spans))

    def strike(self) -> None:
        """Kill the agent of a worker, and start the rank again."""
        rank = int(self.random.choice([*self._cluster.hosts().values()]).partition("#")[2])
        self.kills.append(time.monotonic())
        self._group.agents.pop(rank).kill()
        self._group.start(rank)

    def wait(self, run: Run) -> None:
        """Train until the rank that was started last has joined, and whatever host may be lost."""
        until = time.monotonic() + _PATIENCE
        while not (len(self._cluster.spares) == 1 and run.pipe.runtime.history.safe):
            run.act("train")
            if time.monotonic() > until:
                raise TimeoutError("no rank has come, or no snapshot")


def disturbed(args: argparse.Namespace, folder: Path) -> tuple[Killer, list[float], Any]:
    """Run with kills; return what came of them, all steps' losses, and the weights."""
    losses: list[float] = []
    with ranks(5) as group, closing(group), group.connect(spares=1) as cluster:
        killer = Killer(group, cluster, args.seed)

        def told(result: rp.StepResult) -> None:
            losses.append(result.loss)
            killer.told(result)

        run = Run(cluster, folder, told, width=args.width)
        begun = time.monotonic()
        for _ in range(5):
            run.act("train")
        step = (time.monotonic() - begun) / 5
        for _ in range(args.kills):
            killer.wait(run)
            timer = threading.Timer(killer.random.random() * 4 * step, killer.strike)
            timer.start()
            while timer.is_alive() or len(killer.actions) < len(killer.kills):
                run.act("train")
        killer.wait(run)
        return killer, losses, run.pipe.state_dict()


def main() -> int:
    """Exit status 1 if a loss or a weight differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--width", type=int, default=192)
    args = parser.parse_args()
    print(f"seed {args.seed}, load {os.getloadavg()[0]:.1f}", flush=True)
    with immortal.ground() as folder:
        killer, losses, weights = disturbed(args, folder)
        with rp.launch(3, threads=1, heal=False) as cluster:
            expected: list[float] = []
            run = Run(cluster, folder, lambda result: expected.append(result.loss), width=args.width)
            for _ in losses:
                run.act("train")
            same = immortal.alike(weights, run.pipe.state_dict())
    times = [action - kill for kill, action in zip(killer.kills, killer.actions, strict=True)]
    row = [str(len(times)), f"{statistics.median(times):.3f}", f"{max(times):.3f}"]
    print(_tables.text(("hosts lost", "action: median, s", "max, s"), [row]))
    differ = [number for number, pair in enumerate(zip(losses, expected, strict=True)) if pair[0] != pair[1]]
    print(f"{len(losses)} steps; steps whose losses differ: {differ[:5]}; weights equal: {same}")
    return int(losses != expected or not same)


if __name__ == "__main__":
    sys.exit(main())
