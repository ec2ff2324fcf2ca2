"""A training run that saves after every step, killed at random moments; ./benchmarks/run checkpoints, too."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

import rpcpipe as rp
from support.faults import ended, wait_for
from support.local_cluster import LocalCluster
from support.models import adamw, batches, cross_entropy, mlp
from support.oracle import Oracle

WORKERS = 2
_TESTS = Path(__file__).parents[1]
# Large enough for a save to have moments: 3 tensors of this, times 8 layers.
WIDTH = 192
_BATCHES = 8


def train_for_ever(folder: Path) -> None:
    """Go on from what is in ``folder`` and save after every step; prints the workers' pids, then every save."""
    torch.set_num_threads(1)
    cluster = rp.launch(workers=WORKERS, threads=1, timeout=20.0, heal=False)
    pipe = rp.Pipeline(mlp(width=WIDTH), cluster, loss=cross_entropy, optimizer=adamw, chunks=2)
    if folder.exists() and any(folder.glob("0*")):
        pipe.load(folder)
    print(*[worker.pid for worker in cluster.workers], flush=True)
    data = list(batches(_BATCHES, width=WIDTH))
    while True:
        pipe.train_step(*data[pipe.trained % _BATCHES])
        pipe.save(folder, position=pipe.trained)
        print(pipe.trained, flush=True)


@dataclass
class Kills:
    """Rounds of killing; ``torn``: how many came in the midst of a save, ``steps``: trained in all."""

    folder: Path
    seed: int = 0
    rounds: int = 0
    torn: int = 0
    steps: int = 0
    victims: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._oracle = Oracle(mlp(width=WIDTH), adamw, cross_entropy, 2)
        self._data = list(batches(_BATCHES, width=WIDTH))

    def round(self, victim: str) -> None:
        """Kill the driver or a worker at a random moment; raises unless the folder is as it must be."""
        command = [sys.executable, "-m", "support.killed_saves", str(self.folder)]
        log = self.folder.parent / "stderr"
        with (
            log.open("w") as stderr,
            subprocess.Popen(command, cwd=_TESTS, stdout=subprocess.PIPE, stderr=stderr, text=True) as child,
        ):
            assert child.stdout is not None
            pids = [int(pid) for pid in child.stdout.readline().split()]
            assert len(pids) == WORKERS, log.read_text()
            saved = [child.stdout.readline()]
            time.sleep(self._random.uniform(0.0, 0.4))  # the moment
            os.kill(child.pid if victim == "driver" else self._random.choice(pids), signal.SIGKILL)
            saved += child.stdout.readlines()
        errors = log.read_text()
        assert victim == "driver" or "WorkerLost" in errors, errors
        for pid in pids:
            wait_for(lambda pid=pid: not psutil.pid_exists(pid) or ended(psutil.Process(pid)))  # type: ignore[misc]
        self.torn += any(self.folder.glob(".rpcpipe-*")) or "pipeline/state.py" in errors
        self.check(at_least=int(saved[-1]))
        self.rounds += 1
        self.victims[victim] = self.victims.get(victim, 0) + 1

    def check(self, at_least: int) -> None:
        """The folder holds a checkpoint of what was said to be saved, or of the step after, to the bit."""
        cluster = LocalCluster(1)
        pipe = rp.Pipeline(mlp(width=WIDTH), cluster, loss=cross_entropy, optimizer=adamw, chunks=2)
        assert pipe.load(self.folder) == pipe.trained
        assert pipe.trained in (at_least, at_least + 1), f"{pipe.trained} is in the folder, {at_least} was saved"
        while self._oracle.step < pipe.trained:
            self._oracle.train_step(*self._data[self._oracle.step % _BATCHES])
        found = pipe.state_dict()
        for name, value in self._oracle.model.state_dict().items():
            assert torch.equal(found[name], value), name
        self.steps = pipe.trained


if __name__ == "__main__":
    train_for_ever(Path(sys.argv[1]))
