"""Figures beside the loss, computed where the outputs are: on the last stage's worker."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rpcpipe.model.microbatch import Nest

# (output, target) -> (sum, count), numbers or scalar tensors.
Metric = Callable[[Any, Any], tuple[Any, Any]]
Sums = dict[str, tuple[float, float]]


def measure(metrics: Mapping[str, Metric], output: Nest, target: Nest) -> Sums:
    """Every metric's (sum, count) for one micro-batch; TypeError for anything else, by name."""
    found = {}
    for name, metric in metrics.items():
        value = metric(output, target)
        try:
            total, count = value
            found[name] = float(total), float(count)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"metric {name!r} must return (sum, count), two numbers or scalar tensors, not {value!r}"
            ) from error
    return found


def means(sums: Iterable[Sums]) -> dict[str, float]:
    """Sum of the sums over sum of the counts, by name; NaN where nothing counted."""
    totals: dict[str, tuple[float, float]] = {}
    for part in sums:
        for name, (value, count) in part.items():
            so_far = totals.get(name, (0.0, 0.0))
            totals[name] = so_far[0] + value, so_far[1] + count
    return {name: value / count if count else math.nan for name, (value, count) in totals.items()}
