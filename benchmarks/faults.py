"""Every fault in every phase on every stage; a table of what the driver made of it."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rpcpipe import _tables
from support import faults


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if any fault was noticed too late, not named, or left something behind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fault", choices=faults.FAULTS, action="append")
    parser.add_argument("--phase", choices=faults.PHASES, action="append")
    args = parser.parse_args(arguments)
    rows, good = [], True
    for fault in args.fault or faults.FAULTS:
        for phase in args.phase or faults.PHASES:
            for stage in range(faults.STAGES):
                row, passed = one(fault, phase, stage)
                good &= passed
                rows.append(row)
                print("  ".join(row), file=sys.stderr)
    print(_tables.text(("fault", "phase", "stage", "noticed, s", "close, s", "left", "error", ""), rows))
    return int(not good)


def one(fault: str, phase: str, stage: int) -> tuple[list[str], bool]:
    """A row of the table, and whether it is as it should be."""
    with tempfile.TemporaryDirectory() as folder:
        found = faults.run(fault, phase, stage, Path(folder))
    if found is None:
        return [fault, phase, str(stage), "-", "-", "-", "cannot be done to a process from outside", ""], True
    limit = 2.0 if phase == "close" else faults.LIMITS[fault]
    named = phase == "close" or (f"worker{stage}" in found.error and found.error.startswith(("Worker", "Rend")))
    passed = found.seconds <= limit and found.close_seconds <= 2.0 and named and not found.left
    first = found.error.partition("\n")[0]
    cells = [fault, phase, str(stage), f"{found.seconds:.3f}", f"{found.close_seconds:.3f}", ", ".join(found.left)]
    return [*cells, first[:90], "ok" if passed else "BAD"], passed


if __name__ == "__main__":
    sys.exit(main())
