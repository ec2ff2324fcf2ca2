"""Activation checkpointing (Chen et al., "Training Deep Nets with Sublinear Memory Cost", section 3).

A stage's forward is a chain of pieces, runs of layers. A piece either keeps its activations or drops
them, keeps its input, and is run again when its backward is due. Which of the two is decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

Checkpoint = str | float | Callable[[int, int], bool]

MODES = ("never", "except_last", "always")


class Run(NamedTuple):
    """Layers ``start`` … ``stop - 1`` of a stage; ``drop``: their activations are recomputed."""

    start: int
    stop: int
    drop: bool


def check(checkpoint: Checkpoint) -> None:
    """ValueError unless ``checkpoint`` is a mode, a ratio, or a function of (stage, chunk)."""
    ratio = isinstance(checkpoint, (int, float)) and not isinstance(checkpoint, bool) and 0 <= checkpoint <= 1
    if not (ratio or checkpoint in MODES or callable(checkpoint)):
        raise ValueError(
            f"checkpoint must be one of {', '.join(map(repr, MODES))}, a ratio from 0 to 1, or a function of"
            f" (stage, chunk), not {checkpoint!r}"
        )


class Recompute:
    """The choice for one stage of ``layers`` layers."""

    def __init__(self, checkpoint: Checkpoint, stage: int, last_stage: int, layers: int) -> None:
        self._checkpoint, self._stage, self._last_stage, self._layers = checkpoint, stage, last_stage, layers
        self._learnt: list[Run] | None = None

    @property
    def learns(self) -> bool:
        """Are the layers' costs wanted, one run each?"""
        ratio = self._checkpoint
        return isinstance(ratio, (int, float)) and 0 < ratio < 1 and self._learnt is None

    def runs(self, chunk: int) -> list[Run]:
        """How the stage forwards micro-batch ``chunk``."""
        if self.learns:
            return [Run(layer, layer + 1, drop=False) for layer in range(self._layers)]
        return self._learnt or [Run(0, self._layers, drop=self._drops(chunk))]

    def _drops(self, chunk: int) -> bool:
        mode = self._checkpoint
        if callable(mode):
            return bool(mode(self._stage, chunk))
        if mode == "except_last":
            return self._stage < self._last_stage
        return mode in ("always", 1)

    def learn(self, costs: Sequence[tuple[int, float]]) -> None:
        """``costs``: each layer's bytes and seconds."""
        assert not isinstance(self._checkpoint, str)
        assert not callable(self._checkpoint)
        self._learnt = merge(select(costs, float(self._checkpoint)))


def select(costs: Sequence[tuple[int, float]], ratio: float) -> list[bool]:
    """Which layers to recompute: most bytes per second first, up to ``ratio`` of all bytes."""
    left = ratio * sum(size for size, _ in costs)
    chosen = [False] * len(costs)
    for layer in sorted(range(len(costs)), key=lambda at: costs[at][0] / max(costs[at][1], 1e-9), reverse=True):
        if 0 < costs[layer][0] <= left:
            left -= costs[layer][0]
            chosen[layer] = True
    return chosen


def merge(chosen: Sequence[bool]) -> list[Run]:
    """Neighbours that are treated alike, as one run."""
    runs, start = [], 0
    for drop, group in groupby(chosen):
        stop = start + len(list(group))
        runs.append(Run(start, stop, drop))
        start = stop
    return runs
