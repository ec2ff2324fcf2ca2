"""What torch keeps private of autograd and optimizers, pinned: an upgrade that changes what is used breaks these."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import GradientEdge, _engine_run_backward, get_gradient_edge, saved_tensors_hooks
from torch.optim.optimizer import _global_optimizer_pre_hooks, register_optimizer_step_pre_hook

from rpcpipe.stage.graph import raw_saved, saved_tensors, unpacks_by_hook


def edge_of(tensor: torch.Tensor) -> GradientEdge:
    return get_gradient_edge(tensor)


def node_of(tensor: torch.Tensor) -> torch.autograd.graph.Node:
    assert tensor.grad_fn is not None
    return tensor.grad_fn


def test_the_engine_accumulates_what_enters_at_edges() -> None:
    """By place: edges, gradients, keep_graph, create_graph, inputs. It sums a gradient to the shape at its edge."""
    x, bias = torch.ones(2, 3, requires_grad=True), torch.ones(3, requires_grad=True)
    doubled = 2 * x
    edges = (edge_of(doubled), edge_of(bias))
    grads = (torch.ones(2, 3), torch.ones(2, 3))
    _engine_run_backward(edges, grads, False, False, (), allow_unreachable=True, accumulate_grad=True)
    assert x.grad is not None
    assert x.grad.tolist() == [[2.0] * 3] * 2
    assert bias.grad is not None
    assert bias.grad.tolist() == [2.0] * 3


def test_the_engine_returns_gradients_of_inputs_and_keeps_none() -> None:
    x, unused = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    out = x.exp()
    inputs, options = (edge_of(x), edge_of(unused)), {"allow_unreachable": True, "accumulate_grad": False}
    found, none = _engine_run_backward((out,), (torch.ones(2),), False, False, inputs, **options)
    torch.testing.assert_close(found, x.detach().exp())
    assert (none, x.grad) == (None, None)
    with pytest.raises(RuntimeError, match="second time"):  # keep_graph was False
        _engine_run_backward((out,), (torch.ones(2),), False, False, inputs, **options)


def test_nodes_show_what_they_save() -> None:
    x, y = torch.ones(2, requires_grad=True), torch.full((2,), 3.0, requires_grad=True)
    product = node_of(x * y)
    assert [name for name in dir(product) if name.startswith("_raw_saved_")] == ["_raw_saved_other", "_raw_saved_self"]
    assert [saved.tolist() for saved in saved_tensors(product)] == [[3, 3], [1, 1]]
    assert not unpacks_by_hook(product)
    indexed = node_of(x[torch.tensor([1, 0])])
    assert [saved.data.tolist() for saved in raw_saved(indexed)] == [[1, 0]]  # from a tuple
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        assert unpacks_by_hook(node_of(x * y))


def test_optimizers_keep_their_hooks_before_a_step() -> None:
    def hook(*_: Any) -> None:
        pass

    optimizer: Any = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    assert (len(optimizer._optimizer_step_pre_hooks), len(_global_optimizer_pre_hooks)) == (0, 0)
    own, everyones = optimizer.register_step_pre_hook(hook), register_optimizer_step_pre_hook(hook)
    assert list(optimizer._optimizer_step_pre_hooks.values()) == [hook]
    assert list(_global_optimizer_pre_hooks.values()) == [hook]
    own.remove()
    everyones.remove()
    assert (len(optimizer._optimizer_step_pre_hooks), len(_global_optimizer_pre_hooks)) == (0, 0)
