"""How many of its random cases a test runs: some of them, or all where RPCPIPE_DEEP is set."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def some(cases: Iterable[T], usual: int) -> list[T]:
    """Return ``usual`` of ``cases`` in their order, always the same and without a pattern; all of them if deep."""
    every = list(cases)
    if os.environ.get("RPCPIPE_DEEP") or usual >= len(every):
        return every
    return [every[at] for at in sorted(random.Random(0).sample(range(len(every)), usual))]
