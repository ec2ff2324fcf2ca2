"""Kill workers in all phases of one run, which must end with the bits of the same run without kills and grow nothing.

Workers kill themselves in a forward, a backward, an update or a call (SIGKILL, SIGSTOP, os._exit), at an action drawn
by lot; from outside they are killed (SIGKILL, SIGSTOP) at a moment drawn by lot of a step, of steps ahead, of an
evaluation, prediction, save or state_dict, and between steps. Each kill is followed by a training step.

"action": from the kill to the start of the first action, by the workers' own clocks (``StepResult.timeline``), of the
first training step whose actions all began after it. A worker that is killed by itself notes when. Where the kill came
in another call, the rest of that call is in it; where it came between calls the next call finds it at once. "replaced":
``ClusterEvent.seconds``, from the first round of replacement to the successor's joining.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

import rpcpipe as rp
from rpcpipe import _tables
from support import immortal
from support.immortal import Run

# By phase: the act that it is a phase of.
INSIDE = {"forward": "train", "backward": "train", "update": "train", "call": "call"}
OUTSIDE = {
    "any moment": "train", "steps ahead": "ahead", "idle": "idle", "evaluate": "evaluate", "predict": "predict",
    "save and load": "save", "state_dict": "state_dict",
}  # fmt: skip
PHASES = INSIDE | OUTSIDE
WARM = 3  # rounds of all acts without kills, which say how long they take


@dataclass
class Kill:
    """A worker's death: when, and when the next action began."""

    phase: str
    how: str
    time: float
    action: float | None = None


@dataclass
class Usage:
    """What driver and workers have of the system."""

    driver_fds: int
    worker_fds: int
    driver_threads: int
    worker_threads: int
    processes: int
    memfds: int
    memfd_mib: float
    driver_mib: float
    workers_mib: float
    shmem_mib: float

    @classmethod
    def now(cls, cluster: rp.Cluster) -> Usage:
        """Look at all processes; the driver's and all workers' together."""
        own, workers = psutil.Process(), [psutil.Process(worker.pid) for worker in cluster.workers]
        files: dict[tuple[int, int], float] = {}
        for process in (own, *workers):
            files |= _memfds(process.pid)
        return cls(
            driver_fds=own.num_fds(),
            worker_fds=sum(worker.num_fds() for worker in workers),
            driver_threads=own.num_threads(),
            worker_threads=sum(worker.num_threads() for worker in workers),
            processes=len(own.children(recursive=True)),
            memfds=len(files),
            memfd_mib=sum(files.values()),
            driver_mib=_pss(own.pid),
            workers_mib=sum(_pss(worker.pid) for worker in workers),
            shmem_mib=_field(Path("/proc/meminfo"), "Shmem:"),
        )


def _memfds(pid: int) -> dict[tuple[int, int], float]:
    """By device and inode, the MiB of anonymous files that a process has open."""
    found = {}
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if os.readlink(descriptor).startswith("/memfd:"):
                status = os.stat(descriptor)
                found[status.st_dev, status.st_ino] = status.st_blocks * 512 / 2**20
        except FileNotFoundError:
            continue
    return found


def _pss(pid: int) -> float:
    return _field(Path(f"/proc/{pid}/smaps_rollup"), "Pss:")


def _field(file: Path, name: str) -> float:
    line = next(line for line in file.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


@dataclass
class Killer:
    """Kills workers in a run's acts, and notes what came of it."""

    cluster: rp.Cluster
    armed: Path
    random: random.Random
    seconds: dict[str, float] = field(default_factory=dict)  # by act, without a kill
    kills: list[Kill] = field(default_factory=list)

    def told(self, result: rp.StepResult) -> None:
        """Note the first action after each kill that has none yet."""
        began = min(span.start for span in result.timeline.spans)
        for kill in self.kills[-8:]:
            if kill.action is None and began > kill.time:
                kill.action = began

    @contextmanager
    def during(self, phase: str, how: str) -> Iterator[None]:
        """Kill a worker while the block runs."""
        with self._armed(phase, how) if phase in INSIDE else self._struck(phase, how):
            yield

    @contextmanager
    def _armed(self, phase: str, how: str) -> Iterator[None]:
        layer = self.random.randrange(immortal.LAYERS) if phase in ("forward", "backward") else ""
        skip = self.random.randrange(immortal.CHUNKS) if phase in ("forward", "backward") else 0
        immortal.arm(self.armed, f"{phase}{layer}", how, skip)
        try:
            yield
        finally:
            if (struck := immortal.disarm(self.armed)) is not None:
                self.kills.append(Kill(phase, how, struck))

    @contextmanager
    def _struck(self, phase: str, how: str) -> Iterator[None]:
        if phase == "idle" and how == "exit":
            now = time.monotonic()
            try:
                self.cluster.call(self.random.choice(self.cluster.workers), os._exit, 3)
            except rp.WorkerLost:
                self.kills.append(Kill(phase, how, now))
            yield
            return
        timer = threading.Timer(self.random.random() * self.seconds[PHASES[phase]], self._strike, (phase, how))
        timer.start()
        if phase == "idle" and self.random.random() < 0.5:
            timer.join()  # else the next step has perhaps begun
        yield
        timer.join()

    def _strike(self, phase: str, how: str) -> None:
        pid = self.random.choice(self.cluster.workers).pid
        now = time.monotonic()
        try:
            os.kill(pid, getattr(signal, how))
        except ProcessLookupError:
            return
        self.kills.append(Kill(phase, how, now))


def disturbed(args: argparse.Namespace, folder: Path) -> tuple[Killer, list[tuple[str, list[float]]], list[Usage], Any]:
    """Run with kills, until there are enough or the time is over; return what was done and what came of it."""
    lots, until = random.Random(args.seed), time.monotonic() + args.seconds
    with rp.launch(args.workers, threads=1) as cluster:
        killer = Killer(cluster, folder / "armed", random.Random(args.seed + 1))
        run = Run(cluster, folder, killer.told, **options(args))
        done, usages = list[tuple[str, list[float]]](), list[Usage]()
        for act in [*dict.fromkeys(PHASES.values())] * WARM:
            begun = time.monotonic()
            done.append((act, run.act(act)))
            killer.seconds[act] = max(0.005, time.monotonic() - begun)
        while len(killer.kills) < args.kills and time.monotonic() < until:
            phase = lots.choice([*PHASES])
            how = lots.choice(_ways(phase)) if lots.random() < 0.5 else "SIGKILL"
            if how == "SIGSTOP" and lots.random() < 0.7:  # each takes the heartbeat's time
                how = "SIGKILL"
            with killer.during(phase, how):
                done.append((PHASES[phase], run.act(PHASES[phase])))
            done.append(("train", run.act("train")))
            usages.append(Usage.now(cluster))
        # The last kill may have come at the end of its act.
        done.append(("train", run.act("train")))
        updates = run.steps * (immortal.CHUNKS if args.schedule == "pipedream" else 1)
        assert run.pipe.trained == updates, f"{updates} updates were asked for, {run.pipe.trained} are done"
        return killer, done, usages, run.pipe.state_dict()


def _ways(phase: str) -> tuple[str, ...]:
    return immortal.HOW if phase in INSIDE or phase == "idle" else immortal.HOW[:2]


def options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the pipeline is made with."""
    shared = {"width": args.width, "schedule": args.schedule}
    return {**shared, "replicas": args.replicas, "shard_optimizer": args.replicas > 1}


def undisturbed(
    args: argparse.Namespace, folder: Path, done: list[tuple[str, list[float]]]
) -> tuple[list[int], dict[str, Any]]:
    """Do the same without kills; return the numbers of the acts whose values differ, and the weights."""
    with rp.launch(args.workers, threads=1, heal=False) as cluster:
        run = Run(cluster, folder, lambda result: None, **options(args))
        differ = [number for number, (act, values) in enumerate(done) if run.act(act) != values]
        return differ, run.pipe.state_dict()


def table(killer: Killer) -> str:
    """Return the times of each phase and way to die."""
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for kill in killer.kills:
        assert kill.action is not None
        stopped = "SIGSTOP" if kill.how == "SIGSTOP" else "SIGKILL, exit"
        for phase in (kill.phase, "all", *(["in a step"] if PHASES[kill.phase] in ("train", "ahead") else [])):
            groups[stopped, phase].append(kill.action - kill.time)
    order = [*PHASES, "in a step", "all"]
    rows = [
        [how, phase, str(len(times)), f"{statistics.median(times):.3f}", f"{max(times):.3f}"]
        for (how, phase), times in sorted(groups.items(), key=lambda item: (item[0][0], order.index(item[0][1])))
    ]
    return _tables.text(("death", "phase", "kills", "action: median, s", "max, s"), rows)


def growth(usages: list[Usage]) -> str:
    """Return the means of the first and the last third of the run."""
    third = max(1, len(usages) // 3)
    rows = []
    for name in Usage.__dataclass_fields__:
        values = [float(getattr(usage, name)) for usage in usages]
        first, last = statistics.mean(values[:third]), statistics.mean(values[-third:])
        rows.append([name, f"{first:.1f}", f"{last:.1f}", f"{last - first:+.1f}", f"{max(values):.1f}"])
    return _tables.text(("", "first third", "last third", "growth", "most"), rows)


def _load() -> str:
    return f"load {os.getloadavg()[0]:.1f}"


def main() -> int:
    """Exit status 1 if a value or a weight differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=180.0, help="stop then, with fewer kills")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--replicas", type=int, default=1, help="with more than 1 the optimizer is sharded")
    parser.add_argument("--schedule", default="1f1b", help="with pipedream it streams")
    parser.add_argument("--width", type=int, default=192)
    args = parser.parse_args()
    print(f"seed {args.seed}, {args.workers} workers, {args.replicas} replicas, {_load()}", flush=True)
    with immortal.ground() as folder:
        begun = time.monotonic()
        killer, done, usages, weights = disturbed(args, folder)
        seconds = time.monotonic() - begun
        differ, expected = undisturbed(args, folder, done)
    print(table(killer))
    print(growth(usages))
    same = immortal.alike(weights, expected)
    ways = ", ".join(f"{count} by {how}" for how, count in Counter(kill.how for kill in killer.kills).items())
    print(f"{len(killer.kills)} kills ({ways}) in {len(done)} calls and {seconds:.0f} s, {_load()}")
    print(f"calls whose values differ: {differ}; weights as without kills, to the bit: {'yes' if same else 'NO'}")
    return int(bool(differ) or not same)


if __name__ == "__main__":
    sys.exit(main())
