"""Random numbers that depend on (seed, step, micro-batch, layer) only.

Dropout therefore draws the same bits on any number of stages, under any schedule, and in a
recomputation. A plain loop reproduces a pipeline by calling ``seed_layer`` before each layer.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

_MASK = (1 << 64) - 1
# Takes the place of the step's number when a layer's initial weights are drawn.
_INITIAL = _MASK


def derive(*parts: int) -> int:
    """Return a 64-bit seed computed from integers: splitmix64 (Steele et al., OOPSLA 2014) over their sequence."""
    state = 0
    for part in parts:
        state = (state ^ (part & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def seed_layer(seed: int, step: int, chunk: int, layer: int) -> None:
    """Seed this process's generators for ``layer``'s forward of micro-batch ``chunk`` in ``step``."""
    _seed(derive(seed, step, chunk, layer))


def seed_init(seed: int, layer: int) -> None:
    """Seed this process's generators for building ``layer`` from its LayerSpec."""
    _seed(derive(seed, _INITIAL, 0, layer))


def seed_all(seed: int) -> None:
    """Seed torch's generator on the CPU, Python's and numpy's, for reading batches; ``seed`` is at least 0."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed & 0xFFFFFFFF)


def _seed(value: int) -> None:
    # Not torch.manual_seed: that visits every backend and costs 20 times as much per layer.
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed(value)


# What Python's generator and numpy's, if numpy is imported, go on from.
PythonState = tuple[Any, Any]


def python_state() -> PythonState:
    """Return the state of the generators that layers may use beside torch's."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else numpy.random.get_state()


def set_python_state(state: PythonState) -> None:
    """Go on from ``state``, for a recomputation or after one."""
    random.setstate(state[0])
    if state[1] is not None:
        sys.modules["numpy"].random.set_state(state[1])
