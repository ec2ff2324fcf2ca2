from __future__ import annotations

import torch
from torch import nn

from rpcpipe.stage import autograd
from rpcpipe.stage.autograd import Saved, StageInput


def test_gradients_of_inputs_land_in_the_box() -> None:
    linear, x = nn.Linear(3, 3), torch.randn(2, 3)
    nest, entered = autograd.enter(StageInput({"x": x, "ids": torch.arange(3), "n": 5}, [True, False]))
    out = linear(nest["x"].mul_(2))  # in place on what came from the stage before: no leaf is touched
    grads = autograd.backward(Saved.of(out, entered), [torch.ones(2, 3)])
    torch.testing.assert_close(grads[0], 2 * torch.ones(2, 3) @ linear.weight)
    assert linear.weight.grad is not None
    assert not x.requires_grad


def test_an_unused_input_and_an_unused_output_have_no_gradient() -> None:
    linear = nn.Linear(3, 3)
    nest, entered = autograd.enter(StageInput((torch.randn(2, 3), torch.randn(2, 3)), [True, True]))
    outputs = (linear(nest[0]), linear(nest[0]) * 2)
    grads = autograd.backward(Saved.of(outputs, entered), [torch.ones(2, 3), None])
    assert grads[0] is not None
    assert grads[1] is None
    torch.testing.assert_close(linear.bias.grad, torch.full((3,), 2.0))


def test_nothing_is_recorded_without_gradients() -> None:
    x = torch.randn(2)
    with torch.no_grad():
        nest, entered = autograd.enter(StageInput(x, [True]))
    assert nest is x
    assert entered.box == [None]
    assert entered.edges == []
    left = autograd.leave((torch.ones(2, requires_grad=True) * 2, torch.arange(2)))
    assert left.wants_grad == [True, False]
    assert not left.nest[0].requires_grad
