"""Closed forms for the bubble of a pipeline with equal stages."""

from __future__ import annotations

from rpcpipe.errors import ArgumentError


def bubble_fraction(stages: int, chunks: int) -> float:
    """Return the idle share of GPipe and 1F1B with equal stages: (K - 1) / (K - 1 + M)."""
    if stages < 1 or chunks < 1:
        raise ArgumentError(f"stages and chunks must be at least 1, not {stages} and {chunks}")
    return (stages - 1) / (stages - 1 + chunks)


def optimal_microbatches(num_stages: int, target_bubble_rate: float = 0.1) -> int:
    """Return the micro-batches that bring the bubble down to ``target_bubble_rate``: (K - 1)(1/rate - 1).

    2 stages → 9, 4 → 27, 8 → 63, 16 → 135 at the default rate.
    """
    if num_stages < 1 or not 0 < target_bubble_rate < 1:
        raise ArgumentError(
            f"num_stages must be at least 1 and target_bubble_rate in (0, 1), not {num_stages}, {target_bubble_rate}"
        )
    # Rounded first: 15 * (1 / 0.1 - 1) is 134.99999999999997 or 135.0 depending on the rate's bits.
    return max(1, int(round((num_stages - 1) * (1 / target_bubble_rate - 1), 9)))
