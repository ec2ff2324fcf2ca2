"""The formulas against what torch counts."""

from __future__ import annotations

import pytest
import torch

from gpt_model import gpt, next_token_loss
from rpcpipe.model.layers import named_layers
from rpcpipe.planning.gpt import GPT
from rpcpipe.stage.profiler import estimate


def test_operations_and_parameters_are_those_of_the_model() -> None:
    """Counted on the meta device: GPT-3 takes no memory."""
    ids = torch.zeros(2, 2048, dtype=torch.long)
    counted = estimate(
        named_layers(gpt(50257, 12288, 96, 96, 2048)), ids, flops=312e12, loss=next_token_loss, target=ids
    )
    formula = GPT(96, 12288, 96, 50257, 2048, autocast=None).layer_costs(2, 312e12)
    assert len(counted) == len(formula) == 98
    for ours, theirs in zip(formula, counted, strict=True):
        for field in ("forward", "backward", "input_gradient", "weight_gradient"):
            assert getattr(ours, field) == pytest.approx(getattr(theirs, field), rel=1e-6)
        assert ours.parameter_bytes == pytest.approx(theirs.parameter_bytes, rel=1e-5)
    assert all(a.output_bytes == b.output_bytes for a, b in zip(formula[:-1], counted[:-1], strict=True))


def test_the_175_billion() -> None:
    assert GPT(96, 12288, 96, 50257, 2048).parameters == pytest.approx(175e9, rel=0.01)


@pytest.mark.parametrize("sizes", [(0, 8, 2, 10, 4), (2, 8, 3, 10, 4)])
def test_impossible_sizes(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be at least 1|cannot be shared"):
        GPT(*sizes)
