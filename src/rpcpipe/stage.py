"""One stage of the model: its layers, and what it remembers of the micro-batches in flight.

Knows no transport, no schedule and no other stage.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from rpcpipe import backward as autograd
from rpcpipe import rng
from rpcpipe.messages import StepPlan
from rpcpipe.microbatch import Nest, map_tensors
from rpcpipe.split_backward import Deferred, backward_input, backward_weight

Loss = Callable[[Any, Any], Any]


class Stage:
    """Layers ``first_layer`` … of the model, on one device.

    ``loss`` is set on the last stage alone.
    """

    def __init__(
        self,
        index: int,
        layers: OrderedDict[str, nn.Module],
        *,
        first_layer: int,
        seed: int,
        device: torch.device,
        loss: Loss | None = None,
    ) -> None:
        self.index = index
        # A new container says it trains whatever its children do; from here on all of them agree.
        self.module = nn.Sequential(layers).to(device).train()
        self.first_layer = first_layer
        self.seed = seed
        self.device = device
        self.loss = loss
        self.losses: dict[int, tuple[torch.Tensor, Any]] = {}
        self.outputs: dict[int, Nest] = {}
        self.peak_in_flight = 0
        self._saved: dict[int, autograd.Saved] = {}
        self._deferred: dict[int, Deferred] = {}

    @property
    def in_flight(self) -> int:
        """Micro-batches whose activations are alive."""
        return len(self._saved) + len(self._deferred)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, in the model's order."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def forward(
        self, plan: StepPlan, chunk: int, received: autograd.Received, target: Nest
    ) -> autograd.Received | None:
        """Run the layers; returns what the next stage gets, None on the last."""
        if self.module.training != plan.training:
            self.module.train(plan.training)
        with torch.set_grad_enabled(plan.training):
            nest, entered = autograd.enter(self._to_device(received))
            outputs = self._run_layers(plan.draw, chunk, nest, entered)
            if self.loss is None:
                return self._save(plan, chunk, outputs, entered)
            if plan.keep_outputs:
                self.outputs[chunk] = map_tensors(torch.Tensor.detach, outputs)
            else:
                self._save(plan, chunk, self._take_loss(chunk, outputs, target), entered)
        return None

    def _run_layers(self, draw: int, chunk: int, nest: Nest, entered: autograd.Entered) -> Nest:
        for index, layer in enumerate(self.module, self.first_layer):
            rng.seed_layer(self.seed, draw, chunk, index)
            nest = layer(nest)
            if index == self.first_layer and not entered.edges:
                # One output only: of several, one may lead to another and be counted twice.
                leaves = autograd.differentiable(nest)
                entered.inner = [get_gradient_edge(leaf) for leaf in leaves] if len(leaves) == 1 else []
        return nest

    def _save(self, plan: StepPlan, chunk: int, outputs: Nest, entered: autograd.Entered) -> autograd.Received:
        if plan.training:
            self._saved[chunk] = autograd.Saved(autograd.differentiable(outputs), entered)
            self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
        return autograd.leave(map_tensors(_to_host, outputs))

    def _take_loss(self, chunk: int, outputs: Nest, target: Nest) -> torch.Tensor:
        assert self.loss is not None
        value = self.loss(outputs, map_tensors(lambda leaf: leaf.to(self.device), target))
        value, count = value if isinstance(value, tuple) else (value, None)
        if not isinstance(value, torch.Tensor) or value.dim():
            shape = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
            raise TypeError(
                f"loss must return a scalar tensor (the mean), or (sum, count), not {shape};"
                " reduce it, for instance by .mean()"
            )
        self.losses[chunk] = (value.detach(), count)
        return value

    def backward(
        self, plan: StepPlan, chunk: int, grads: list[torch.Tensor | None] | None
    ) -> list[torch.Tensor | None]:
        """The whole backward: parameters' ``.grad`` grow, the inputs' gradients are returned."""
        saved = self._saved.pop(chunk)
        return _all_to_host(autograd.backward(saved, self._output_grads(plan, chunk, saved, grads)))

    def backward_input(
        self, plan: StepPlan, chunk: int, grads: list[torch.Tensor | None] | None
    ) -> list[torch.Tensor | None]:
        """The half of the backward that the stage before waits for."""
        saved = self._saved.pop(chunk)
        found, self._deferred[chunk] = backward_input(saved, self._output_grads(plan, chunk, saved, grads))
        return _all_to_host(found)

    def backward_weight(self, chunk: int) -> None:
        """The other half: parameters' ``.grad`` grow."""
        backward_weight(self._deferred.pop(chunk))

    def _output_grads(
        self, plan: StepPlan, chunk: int, saved: autograd.Saved, grads: list[torch.Tensor | None] | None
    ) -> list[torch.Tensor | None]:
        if self.loss is None:
            assert grads is not None
            return [None if grad is None else grad.to(self.device) for grad in grads]
        # A loss that is a mean counts by the micro-batch's share of the batch; sums are divided at the end.
        weight = plan.weights[chunk] if self.losses[chunk][1] is None else 1.0
        return [torch.full_like(loss, weight) for loss in saved.outputs]

    def _to_device(self, received: autograd.Received) -> autograd.Received:
        if self.device.type == "cpu":
            return received
        return autograd.Received(map_tensors(lambda leaf: leaf.to(self.device), received.nest), received.wants_grad)

    def loss_values(self) -> dict[int, tuple[float, float | None]]:
        """(value, count) per micro-batch so far; waits for the device."""
        return {
            chunk: (float(value), None if count is None else float(count))
            for chunk, (value, count) in self.losses.items()
        }

    def reset(self) -> None:
        """Forget the step before, all that a failed one left included."""
        self.losses, self.outputs, self.peak_in_flight = {}, {}, 0
        self._saved.clear()
        self._deferred.clear()
        for parameter in self.module.parameters():
            parameter.grad = None


def _all_to_host(grads: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    return [None if grad is None else _to_host(grad) for grad in grads]


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Tensors travel through host memory; on the CPU this is the tensor itself."""
    return tensor.cpu()
