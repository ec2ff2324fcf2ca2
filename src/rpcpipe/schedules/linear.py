"""Schedules with one stage per worker, each a generator of one worker's actions."""

from __future__ import annotations

from collections.abc import Iterator

from rpcpipe.schedules.action import Action


def naive(rank: int, workers: int, chunks: int) -> Iterator[Action]:
    """Yield one micro-batch through the whole pipeline before the next; a worker is busy 1/K of the time."""
    for chunk in range(chunks):
        yield Action("F", rank, chunk)
        yield Action("B", rank, chunk)


def gpipe(rank: int, workers: int, chunks: int) -> Iterator[Action]:
    """Yield all forwards, then all backwards (Huang et al., "GPipe", section 2.3)."""
    for chunk in range(chunks):
        yield Action("F", rank, chunk)
    for chunk in range(chunks):
        yield Action("B", rank, chunk)


def one_f_one_b(rank: int, workers: int, chunks: int) -> Iterator[Action]:
    """Yield a warm-up of min(M, K - k) forwards, alternation, drain (Narayanan et al., "PipeDream-Flush")."""
    return _alternate(rank, chunks, warmup=workers - rank)


def _alternate(rank: int, chunks: int, warmup: int) -> Iterator[Action]:
    """Yield ``warmup`` forwards, then one backward and one forward in turn, then the remaining backwards."""
    warmup = min(chunks, warmup)
    for chunk in range(warmup):
        yield Action("F", rank, chunk)
    for chunk in range(chunks):
        yield Action("B", rank, chunk)
        if chunk + warmup < chunks:
            yield Action("F", rank, chunk + warmup)


def eager_one_f_one_b(rank: int, workers: int, chunks: int) -> Iterator[Action]:
    """Yield 1F1B with twice the warm-up, so that transfers overlap with work; holds more activations.

    Warm-up min(M, 2(K - k) - 1).
    """
    return _alternate(rank, chunks, warmup=2 * (workers - rank) - 1)


def zb_h1(rank: int, workers: int, chunks: int) -> Iterator[Action]:
    """Yield 1F1B whose weight gradients fill the drain (Qi et al., "Zero Bubble", section 3, ZB-H1).

    Worker k delays each weight gradient by k micro-batches, which keeps K micro-batches alive on
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
