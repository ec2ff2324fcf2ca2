from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from rpcpipe.checkpoint.plain_state import decode, encode
from rpcpipe.errors import CheckpointError


def there_and_back(value: Any) -> Any:
    tensors: dict[str, torch.Tensor] = {}
    return decode(json.loads(json.dumps(encode(value, "it", tensors), allow_nan=False)), tensors.__getitem__)


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
KEYS = st.integers() | st.text() | st.tuples(st.integers(), st.booleans())


@settings(max_examples=40)
@given(
    st.recursive(
        PLAIN,
        lambda inner: (
            st.lists(inner)
            | st.lists(inner).map(tuple)
            | st.dictionaries(KEYS, inner)
            | st.dictionaries(st.text(), inner)
        ),
    )
)
def test_plain_values_come_back_as_they_were(value: Any) -> None:
    found = there_and_back(value)
    assert (found, repr(found)) == (value, repr(value))  # repr: 1 is not True, -0.0 is not 0.0


def test_what_json_lacks() -> None:
    assert math.isnan(there_and_back(float("nan")))
    found = there_and_back({"milestones": Counter({4: 1, 8: 2}), "$tuple": 1, "best": -math.inf})
    assert found == {"milestones": Counter({4: 1, 8: 2}), "$tuple": 1, "best": -math.inf}
    assert isinstance(found["milestones"], Counter)
    tensor = torch.randn(2)
    assert there_and_back({"a": [tensor]})["a"][0] is tensor


def test_what_is_neither_plain_nor_a_tensor_is_named() -> None:
    with pytest.raises(CheckpointError, match="it/a/1 is a Linear"):
        there_and_back({"a": [1, nn.Linear(1, 1)]})


def test_what_is_too_deep_or_too_long_is_named() -> None:
    itself: list[Any] = []
    itself.append(itself)
    for value, message in ((itself, "more than 50 values in each other"), (10**5000, "a number of that many digits")):
        with pytest.raises(CheckpointError, match=f"it/a.* is {message}"):
            there_and_back({"a": value})
    deep: Any = 1
    for _ in range(50):
        deep = (deep,)
    assert there_and_back(deep) == deep


SCHEDULERS: list[Any] = [
    lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    lambda o: lr_scheduler.OneCycleLR(o, 0.1, 10),
    lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.2, cycle_momentum=False),
    lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.CosineAnnealingWarmRestarts(o, 3)], milestones=[3]
    ),
    lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
]


@pytest.mark.parametrize("make", SCHEDULERS)
def test_torchs_schedulers_go_on(make: Any) -> None:
    def fresh() -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        return optimizer, make(optimizer)

    def rates(optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            optimizer.step()
            scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
            found.append(optimizer.param_groups[0]["lr"])
        return found

    one, other = fresh(), fresh()
    rates(*one, 5)
    other[1].load_state_dict(there_and_back(one[1].state_dict()))
    other[0].param_groups[0]["lr"] = one[0].param_groups[0]["lr"]
    assert rates(*one, 4) == rates(*other, 4)
