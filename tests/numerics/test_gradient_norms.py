"""The norm of all gradients is torch's, in the parameters' precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rpcpipe as rp
from support.local_cluster import LocalCluster
from support.models import batches, cross_entropy, mlp
from support.oracle import Natural, assert_same_run


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32])
def test_norms_have_the_parameters_precision(dtype: torch.dtype, clip: float | None) -> None:
    pipe = rp.Pipeline(
        mlp().to(dtype), LocalCluster(2), loss=cross_entropy, optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1),
        chunks=2, balance=[3, 5], clip_grad_norm=clip,
    )  # type: ignore[arg-type]  # fmt: skip
    loop = Natural(mlp().to(dtype), lambda ps: torch.optim.SGD(ps, lr=0.1), cross_entropy, 2, clip=clip)
    assert_same_run(pipe, loop, ((x.to(dtype), y) for x, y in batches(3)))


def test_norms_of_float16_do_not_overflow() -> None:
    def steep(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output * 1e3).sum() * 0.25

    layer = nn.Linear(64, 64, bias=False, dtype=torch.float16)
    nn.init.zeros_(layer.weight)
    pipe = rp.Pipeline(
        [layer, nn.Identity()], LocalCluster(2), loss=steep, optimizer=lambda ps: torch.optim.SGD(ps, lr=1e-5), chunks=1
    )  # type: ignore[arg-type]  # fmt: skip
    x = torch.full((2, 64), 8.0, dtype=torch.float16)
    result = pipe.train_step(x, torch.zeros(2))
    assert result.applied
    assert result.grad_norm == pytest.approx(64 * 4000.0)
