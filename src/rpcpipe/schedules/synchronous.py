"""Schedules with one stage per worker and one weight update per batch.

Each is a generator of one worker's actions; everything else is derived.
"""

from __future__ import annotations

from collections.abc import Iterator

from rpcpipe.schedules.action import Action


def naive(rank: int, workers: int, chunks: int) -> Iterator[Action]:
    """One micro-batch travels the whole pipeline before the next enters: 1/K of the time used."""
    for chunk in range(chunks):
        yield Action("F", rank, chunk)
        yield Action("B", rank, chunk)


def gpipe(rank: int, workers: int, chunks: int) -> Iterator[Action]:
    """All forwards, then all backwards (Huang et al., "GPipe", section 2.3)."""
    for chunk in range(chunks):
        yield Action("F", rank, chunk)
    for chunk in range(chunks):
        yield Action("B", rank, chunk)


def one_f_one_b(rank: int, workers: int, chunks: int) -> Iterator[Action]:
    """Warm up with min(M, K - k) forwards, alternate, drain (Narayanan et al., "PipeDream-Flush")."""
    return _alternate(rank, chunks, warmup=workers - rank)


def _alternate(rank: int, chunks: int, warmup: int) -> Iterator[Action]:
    """``warmup`` forwards, then one backward and one forward by turns, then the rest backwards."""
    warmup = min(chunks, warmup)
    for chunk in range(warmup):
        yield Action("F", rank, chunk)
    for chunk in range(chunks):
        yield Action("B", rank, chunk)
        if chunk + warmup < chunks:
            yield Action("F", rank, chunk + warmup)
