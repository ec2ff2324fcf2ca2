from __future__ import annotations

import torch
from torch import nn

from rpcpipe import gradients


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
