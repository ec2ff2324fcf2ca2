"""Schedules with one stage per worker.

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


def eager_one_f_one_b(rank: int, workers: int, chunks: int) -> Iterator[Action]:
    """1F1B with twice the warm-up, so that transfers hide behind work; holds more activations.

    Warm-up min(M, 2(K - k) - 1).
    """
    return _alternate(rank, chunks, warmup=2 * (workers - rank) - 1)


def zb_h1(rank: int, workers: int, chunks: int) -> Iterator[Action]:
    """1F1B whose weight gradients fill the drain (Qi et al., "Zero Bubble", section 3, ZB-H1).

    Worker k puts each weight gradient off by k micro-batches, which keeps K micro-batches alive on
    every worker, as many as 1F1B does on the first. Makespan M(F + B) + (K - 1)(F + I - W).
    """
    warmup = min(chunks, workers - rank)
    for chunk in range(warmup):
        yield Action("F", rank, chunk)
    for chunk in range(chunks):
        yield Action("I", rank, chunk)
        if chunk >= rank:
            yield Action("W", rank, chunk - rank)
        if chunk + warmup < chunks:
            yield Action("F", rank, chunk + warmup)
    for chunk in range(max(0, chunks - rank), chunks):
        yield Action("W", rank, chunk)
