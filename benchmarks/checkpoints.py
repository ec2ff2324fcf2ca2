"""Kill a run that saves, N times at random moments; the folder must stay readable."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from support.killed_saves import Kills


def main() -> None:
    """Driver and workers in turn; raises at the first folder that is not as it must be."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = Kills(Path(folder) / "run", arguments.seed)
        for number in range(arguments.rounds):
            run.round("driver" if number % 2 == 0 else "worker")
            print(f"{run.rounds} kills, {run.torn} in the midst of a save, {run.steps} steps", flush=True)
    print(f"{run.victims}, always readable and to the bit, in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
