from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.stage import gradients
from support.local_cluster import LocalCluster
from support.models import adamw, batches, cross_entropy, mlp, summed
from support.oracle import Natural, assert_same_run


def parameters(grads: bool = True) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(1))]
    if grads:
        for parameter in made[:2]:
            parameter.grad = torch.randn_like(parameter)
    return made


def test_taking_gives_the_same_tensors_back_and_clears_them() -> None:
    mine = parameters()
    expected = [p.grad for p in mine]
    pointers = [g.data_ptr() for g in expected if g is not None]
    root = gradients.take(mine)
    assert root is not None
    assert [p.grad for p in mine] == [None] * 3
    del expected
    root.backward()  # type: ignore[no-untyped-call]
    assert [p.grad.data_ptr() for p in mine if p.grad is not None] == pointers
    assert gradients.take(parameters(grads=False)) is None


def test_norms_and_clipping_are_torchs() -> None:
    mine = parameters()
    norms = gradients.norms(mine)
    assert len(norms) == 2
    total = gradients.total_norm(norms)
    assert total == float(nn.utils.get_total_norm([p.grad for p in mine if p.grad is not None]))
    reference = [p.grad.clone() for p in mine[:2]]  # type: ignore[union-attr]
    gradients.scale(mine, gradients.clip_factor(total, 0.5))
    stand_in = [nn.Parameter(torch.zeros_like(g)) for g in reference]
    for parameter, grad in zip(stand_in, reference, strict=True):
        parameter.grad = grad
    nn.utils.clip_grad_norm_(stand_in, 0.5)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(mine, stand_in, strict=False))  # type: ignore[arg-type]
    assert gradients.clip_factor(0.1, 0.5) == 1.0


def test_dividing_leaves_missing_gradients_alone() -> None:
    mine = parameters()
    before = mine[0].grad.clone()  # type: ignore[union-attr]
    gradients.divide(mine, 4.0)
    assert torch.equal(mine[0].grad, before / 4)  # type: ignore[arg-type]
    assert mine[2].grad is None


def unscaled(mine: list[nn.Parameter], scale: float) -> list[torch.Tensor]:
    """What GradScaler makes of the gradients."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.ones(()))
    scaler.unscale_(torch.optim.SGD([p for p in mine if p.grad is not None], lr=0.0))
    return [p.grad for p in mine if p.grad is not None]


@pytest.mark.parametrize("scale", [65536.0, 1.0, 1000.0, 3.0])
def test_unscaling_is_torchs(scale: float) -> None:
    mine = parameters()
    twins = [nn.Parameter(p.detach().clone()) for p in mine]
    for twin, p in zip(twins, mine, strict=True):
        twin.grad = None if p.grad is None else p.grad.clone()
    gradients.unscale(mine, scale)
    expected = unscaled(twins, scale)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(mine, expected, strict=False))  # type: ignore[arg-type]
    assert mine[2].grad is None


# --- clipping and the gate over all stages ---

FROZEN = {"none": [], "first stage": [0, 1], "middle stage": [2, 3], "last stage": [4, 5], "all but one": [0, 1, 4, 5]}


def model(frozen: list[int]) -> nn.Sequential:
    made = mlp(6)
    for at in frozen:
        made[at].requires_grad_(False)
    return made


@pytest.mark.parametrize("loss", [cross_entropy, summed])
@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("frozen", FROZEN)
def test_clipping_is_torchs_on_the_whole_model(frozen: str, dtype: torch.dtype | None, loss: Any) -> None:
    """Whole stages frozen, split backwards too; the norm is below the limit in some steps and above in others."""
    for schedule, limit in (("1f1b", 0.6), ("zb-h1", 0.05)):
        pipe = rp.Pipeline(model(FROZEN[frozen]), LocalCluster(3), loss=loss, optimizer=adamw, schedule=schedule,
                           chunks=3, balance=[2, 2, 2], clip_grad_norm=limit, autocast=dtype)  # fmt: skip
        scaler = torch.amp.GradScaler("cpu") if dtype is torch.float16 else None
        loop = Natural(model(FROZEN[frozen]), adamw, loss, 3, clip=limit, autocast=dtype, scaler=scaler)
        results = assert_same_run(pipe, loop)
        assert any(result.grad_norm > limit for result in results) or limit == 0.6


def test_a_model_that_is_all_frozen_is_refused() -> None:
    with pytest.raises(rp.ModelError, match="nothing to train"):
        rp.Pipeline(model(list(range(6))), LocalCluster(3), loss=cross_entropy, optimizer=adamw, chunks=3)


class Unused(nn.Module):
    """Has a parameter that gets no gradient, which torch's norm leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.linear = nn.Parameter(torch.ones(3)), nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def test_parameters_without_a_gradient() -> None:
    def made() -> nn.Sequential:
        torch.manual_seed(5)
        return nn.Sequential(*[Unused() for _ in range(8)], nn.Linear(12, 4))

    pipe = rp.Pipeline(
        made(), LocalCluster(3), loss=summed, optimizer=adamw, chunks=3, clip_grad_norm=0.01, accumulate=2
    )
    assert_same_run(pipe, Natural(made(), adamw, summed, 3, clip=0.01, accumulate=2))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_is_applied_where_the_loss_is_not_finite(bad: float, dtype: torch.dtype | None) -> None:
    pipe = rp.Pipeline(mlp(), LocalCluster(3), loss=cross_entropy, optimizer=adamw, chunks=3, autocast=dtype)
    first, second, third = batches(3)
    pipe.train_step(*first)
    before = pipe.state_dict()
    second[0][4, 3] = bad
    result = pipe.train_step(*second)
    assert not result.applied
    assert "not applied" in repr(result)
    assert all(torch.equal(before[name], value) for name, value in pipe.state_dict().items())
    assert pipe.train_step(*third).applied
