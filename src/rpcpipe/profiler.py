"""What every layer costs, measured layer by layer: the numbers that a cut of the model is made of."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rpcpipe import backward as autograd
from rpcpipe import layers as model
from rpcpipe.activations import Memory, Meter
from rpcpipe.microbatch import Nest, map_tensors, tensors
from rpcpipe.split_backward import backward_input, backward_weight

_ROUNDS = 5

# Weights, their gradient and the two moments of Adam.
_COPIES = 4


@dataclass(frozen=True)
class LayerProfile:
    """One layer for one micro-batch: seconds (medians of warm runs) and bytes.

    ``activation_bytes`` is what autograd saves, ``output_bytes`` what goes to the next layer.
    """

    name: str
    forward: float
    input_gradient: float
    weight_gradient: float
    activation_bytes: int
    parameter_bytes: int
    output_bytes: int

    @property
    def seconds(self) -> float:
        return self.forward + self.input_gradient + self.weight_gradient

    @property
    def bytes(self) -> int:
        """Of a training worker: parameters, gradient and Adam's moments, and one micro-batch's activations."""
        return _COPIES * self.parameter_bytes + self.activation_bytes


def profile(
    layers: Mapping[str, model.Layer],
    sample: Nest,
    *,
    loss: Callable[[Any, Any], Any] | None = None,
    target: Nest = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[LayerProfile]:
    """Run every layer on what the layer before gives for ``sample``, one micro-batch of inputs.

    With ``loss`` and ``target`` the last layer's figures include the loss. One layer is in memory at a
    time if they are LayerSpecs. What two layers save of the same memory counts once, in the first.
    """
    received = autograd.Received.constant(map_tensors(lambda leaf: leaf.to(device), sample))
    found: list[LayerProfile] = []
    before = _Run(None, Memory())
    for index, (name, layer) in enumerate(layers.items()):
        module = model.build(layer, seed=seed, index=index).to(device).train()
        last = index == len(layers) - 1
        closed = _WithLoss(module, loss, target) if last and loss is not None else module
        result, received, before = _measure(name, closed, received, before)
        found.append(result)
    return found


class _WithLoss(nn.Module):
    def __init__(self, module: nn.Module, loss: Callable[[Any, Any], Any], target: Nest) -> None:
        super().__init__()
        self.module, self.loss, self.target = module, loss, target

    def forward(self, nest: Nest) -> torch.Tensor:
        value = self.loss(self.module(nest), self.target)
        found: torch.Tensor = value[0] if isinstance(value, tuple) else value
        return found


@dataclass
class _Run:
    """A layer's outputs, whose graph keeps what is in ``saved`` alive and its addresses valid."""

    outputs: Nest
    saved: Memory


def _measure(
    name: str, module: nn.Module, received: autograd.Received, before: _Run
) -> tuple[LayerProfile, autograd.Received, _Run]:
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    # A layer that changes its input in place must find it whole every time.
    times = [_round(module, autograd.copied(received)) for _ in range(_ROUNDS + 1)][1:]
    for parameter in module.parameters():
        parameter.grad = None
    with Meter([*module.parameters(), *module.buffers()]) as meter:
        outputs, _ = _forward(module, received)
    for buffer, value in buffers:
        buffer.data.copy_(value)
    forward, inputs, weights = (statistics.median(column) for column in zip(*times, strict=True))
    leaving = autograd.leave(outputs)
    result = LayerProfile(
        name,
        forward,
        inputs,
        weights,
        activation_bytes=meter.beside(before.saved),
        parameter_bytes=sum(parameter.nbytes for parameter in module.parameters()),
        output_bytes=Memory(tensors(leaving.nest)).without(),
    )
    return result, leaving, _Run(outputs, meter.saved)


def _forward(module: nn.Module, received: autograd.Received) -> tuple[Nest, autograd.Entered]:
    nest, entered = autograd.enter(received)
    return module(nest), entered


def _round(module: nn.Module, received: autograd.Received) -> tuple[float, float, float]:
    """Seconds of forward, input gradient and weight gradient."""
    times = [_clock(received)]
    outputs, entered = _forward(module, received)
    times.append(_clock(received))
    saved = autograd.Saved(autograd.differentiable(outputs), entered)
    _, deferred = backward_input(saved, [torch.ones_like(out) for out in saved.outputs])
    times.append(_clock(received))
    backward_weight(deferred)
    times.append(_clock(received))
    return times[1] - times[0], times[2] - times[1], times[3] - times[2]


def _clock(received: autograd.Received) -> float:
    """Now, once the device has done what it was given."""
    if any(leaf.is_cuda for leaf in tensors(received.nest)):
        torch.cuda.synchronize()
    return time.perf_counter()


def costs(profiles: list[LayerProfile], what: str) -> list[float]:
    """What ``balance="time"`` or ``"memory"`` equalises."""
    of: Callable[[LayerProfile], Any] = {"time": lambda p: p.seconds, "memory": lambda p: p.bytes}[what]
    return [float(of(layer)) for layer in profiles]
