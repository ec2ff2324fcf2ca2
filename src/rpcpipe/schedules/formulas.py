"""Closed forms for the bubble of a pipeline with equal stages."""

from __future__ import annotations

from rpcpipe._arguments import require_number
from rpcpipe.errors import require, require_whole


def bubble_fraction(stages: int, chunks: int) -> float:
    """Return the idle share of GPipe and 1F1B with equal stages: (K - 1) / (K - 1 + M)."""
    stages, chunks = require_whole("stages", stages), require_whole("chunks", chunks)
    return (stages - 1) / (stages - 1 + chunks)


def optimal_microbatches(num_stages: int, target_bubble_rate: float = 0.1) -> int:
    """Return the micro-batches that bring the bubble down to ``target_bubble_rate``: (K - 1)(1/rate - 1).

    2 stages → 9, 4 → 27, 8 → 63, 16 → 135 at the default rate.
    """
    num_stages, rate = require_whole("num_stages", num_stages), require_number("target_bubble_rate", target_bubble_rate)
    require(0 < rate < 1, f"target_bubble_rate must be between 0 and 1, not {rate}")
    # Rounded first: 15 * (1 / 0.1 - 1) is 134.99999999999997 or 135.0 depending on the rate's bits.
    return max(1, int(round((num_stages - 1) * (1 / rate - 1), 9)))
