"""Every fault in every phase on every stage; a table of what the driver made of it."""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rpcpipe import _tables
from support import faults


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if any fault was noticed too late, not named, not healed, or left something behind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fault", choices=faults.FAULTS, action="append")
    parser.add_argument("--phase", choices=faults.PHASES, action="append")
    parser.add_argument("--stage", type=int, choices=range(faults.STAGES), action="append")
    parser.add_argument("--heal", choices=("yes", "no"), help="both, unless it is given")
    args = parser.parse_args(arguments)
    good = True
    for heal in (True, False) if args.heal is None else (args.heal == "yes",):
        phases = [phase for phase in args.phase or faults.PHASES if not heal or phase in faults.HEALED]
        rows = []
        for fault, phase in itertools.product(args.fault or faults.FAULTS, phases):
            for stage in args.stage or range(faults.STAGES):
                row, passed = (healed if heal else lost)(fault, phase, stage)
                good &= passed
                rows.append(row)
                print("  ".join(row), file=sys.stderr)
        heads = ("healed, s", "left", "wrong") if heal else ("noticed, s", "close, s", "left", "error")
        print(f"heal={heal}", _tables.text(("fault", "phase", "stage", *heads, ""), rows), sep="\n")
    return int(not good)


def lost(fault: str, phase: str, stage: int) -> tuple[list[str], bool]:
    """A row of the table, and whether it is as it should be: the fault is raised."""
    with tempfile.TemporaryDirectory() as folder:
        found = faults.run(fault, phase, stage, Path(folder))
    if found is None:
        return [fault, phase, str(stage), "-", "-", "-", "cannot be done to a process, or here", ""], True
    limit = 2.0 if phase == "close" else faults.LIMITS[fault]
    named = phase == "close" or (f"worker{stage}" in found.error and found.error.startswith(("Worker", "Rend")))
    passed = found.seconds <= limit and found.close_seconds <= 2.0 and named and not found.left
    first = found.error.partition("\n")[0]
    cells = [fault, phase, str(stage), f"{found.seconds:.3f}", f"{found.close_seconds:.3f}", ", ".join(found.left)]
    return [*cells, first[:90], "ok" if passed else "BAD"], passed


def healed(fault: str, phase: str, stage: int) -> tuple[list[str], bool]:
    """A row of the table, and whether it is as it should be: the call gives what it gives without the fault."""
    with tempfile.TemporaryDirectory() as folder:
        found = faults.run(fault, phase, stage, Path(folder), heal=True)
    if found is None:
        return [fault, phase, str(stage), "-", "-", "cannot be done to a process, or here", ""], True
    passed = found.seconds <= faults.LIMITS[fault] + faults.HEAL_SECONDS and not found.left and not found.wrong
    cells = [fault, phase, str(stage), f"{found.seconds:.3f}", ", ".join(found.left), "; ".join(found.wrong)[:200]]
    return [*cells, "ok" if passed else "BAD"], passed


if __name__ == "__main__":
    sys.exit(main())
