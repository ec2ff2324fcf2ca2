"""How long launches take, what a worker costs, and whether hundreds of them leave anything behind."""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Sequence

import psutil

import rpcpipe as rp
from rpcpipe import _tables


def own_memory() -> float:
    """This process's memory that is nobody else's, in MiB."""
    return float(psutil.Process().memory_full_info().uss) / 2**20


def launched(workers: int) -> tuple[float, float, float]:
    """Seconds to launch and to close, and MiB of an idle worker."""
    start = time.perf_counter()
    cluster = rp.launch(workers, threads=1)
    seconds = time.perf_counter() - start
    size = statistics.mean(cluster.call(worker, own_memory) for worker in cluster.workers)
    start = time.perf_counter()
    cluster.close()
    return seconds, time.perf_counter() - start, size


def usage() -> dict[str, float]:
    """What this process holds."""
    gc.collect()
    process = psutil.Process()
    return {
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
        "RSS, MiB": process.memory_info().rss / 2**20,
        "children": len(process.children(recursive=True)),
        "zombies": sum(child.status() == psutil.STATUS_ZOMBIE for child in process.children(recursive=True)),
    }


def many(count: int) -> int:
    """``count`` launches, the template killed in every fiftieth; the exit status: 1 if something grows."""
    rows = []
    for cycle in range(1, count + 1):
        cluster = rp.launch(1 + cycle % 3, threads=1)
        assert cluster.call(1, lambda: 7) == 7
        if cycle % 50 == 25:
            template = psutil.Process(cluster.workers[0].pid).parent()
            assert template is not None
            template.kill()
        cluster.close()
        if cycle % (count // 5) == 0:
            time.sleep(1.0)  # torch's agent closes its connections to the dead in its own time
            rows.append([str(cycle), *[f"{value:.0f}" for value in usage().values()]])
            print("  ".join(rows[-1]), file=sys.stderr)
    print(_tables.text(("launches", *usage()), rows))
    first, last = ([float(cell) for cell in row[1:]] for row in (rows[0], rows[-1]))
    grown = any(b > a + (20 if index == 2 else 2) for index, (a, b) in enumerate(zip(first, last, strict=True)))
    return int(grown)


def main(arguments: Sequence[str] | None = None) -> int:
    """A table of launches by number of workers, or with ``--many`` what so many of them leave."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=8, help="workers of the first launch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--many", type=int, help="launch so often and see what grows")
    args = parser.parse_args(arguments)
    if args.many:
        return many(args.many)
    rows = [["first", str(args.first), *[f"{value:.3f}" for value in launched(args.first)]]]
    for workers in (2, 4, 8):
        found = [launched(workers) for _ in range(args.rounds)]
        rows.append(
            ["later", str(workers), *[f"{statistics.median(column):.3f}" for column in zip(*found, strict=True)]]
        )
    print(_tables.text(("", "workers", "launch, s", "close, s", "idle worker, MiB"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
