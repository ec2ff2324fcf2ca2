from __future__ import annotations

import math

import pytest
import torch

from rpcpipe.errors import ArgumentError
from rpcpipe.stage.metrics import means, measure


def test_sums_and_counts_by_name() -> None:
    output, target = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])
    found = measure(
        {"error": lambda o, t: ((o - t).abs().sum(), o.numel()), "ones": lambda o, t: (1, 1)}, output, target
    )
    assert found == {"error": (2.0, 2.0), "ones": (1.0, 1.0)}


@pytest.mark.parametrize("value", [3.0, (1.0,), "ab", (torch.zeros(2), 1), None])
def test_anything_else_is_refused_by_name(value: object) -> None:
    with pytest.raises(ArgumentError, match=r"metric 'accuracy' must return \(sum, count\)"):
        measure({"accuracy": lambda o, t: value}, torch.zeros(1), torch.zeros(1))  # type: ignore[arg-type,return-value]


def test_means_weigh_by_count() -> None:
    found = means([{"a": (1.0, 1.0), "b": (0.0, 0.0)}, {"a": (2.0, 5.0), "b": (0.0, 0.0)}])
    assert found["a"] == 0.5
    assert math.isnan(found["b"])
