"""Metrics beside the loss, computed from the outputs on the worker of the last stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rpcpipe.errors import ArgumentError
from rpcpipe.model.microbatch import Nest

# metric(output, target) returns (sum, count), two numbers or scalar tensors.
Metric = Callable[[Any, Any], tuple[Any, Any]]
Metrics = Mapping[str, Metric]
Sums = dict[str, tuple[float, float]]


def measure(metrics: Metrics, output: Nest, target: Nest) -> Sums:
    """Return every metric's (sum, count) for one micro-batch, by name.

    Raises ArgumentError if a metric returns anything else.
    """
    sums = {}
    for name, metric in metrics.items():
        value = metric(output, target)
        try:
            total, count = value
            sums[name] = float(total), float(count)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ArgumentError(
                f"metric {name!r} must return (sum, count), two numbers or scalar tensors, not {value!r}"
            ) from error
    return sums


def means(sums: Iterable[Sums]) -> dict[str, float]:
    """Return the total sum divided by the total count of every metric, by name; NaN where the count is 0."""
    totals: dict[str, tuple[float, float]] = {}
    for micro_batch in sums:
        for name, (value, count) in micro_batch.items():
            so_far = totals.get(name, (0.0, 0.0))
            totals[name] = so_far[0] + value, so_far[1] + count
    return {name: value / count if count else math.nan for name, (value, count) in totals.items()}
