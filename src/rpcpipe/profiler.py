"""What every layer costs, measured layer by layer: the numbers that a cut of the model is made of."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from rpcpipe import backward as autograd
from rpcpipe import layers as model
from rpcpipe.activations import Memory, Meter
from rpcpipe.flow import Flow, advance
from rpcpipe.microbatch import Nest, map_tensors, tensors
from rpcpipe.optimizer import Factory
from rpcpipe.profiles import LayerProfile
from rpcpipe.split_backward import backward_input, backward_weight
from rpcpipe.wires import Wire, inputs, kept

_ROUNDS = 5


def profile(
    layers: Mapping[str, model.Layer],
    sample: Nest,
    *,
    loss: Callable[[Any, Any], Any] | None = None,
    target: Nest = None,
    optimizer: Factory | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[LayerProfile]:
    """Run every layer on what the layer before gives for ``sample``, one micro-batch of inputs.

    With ``loss`` and ``target`` the last layer's figures include the loss; ``optimizer`` is timed too. One
    layer is in memory at a time if they are LayerSpecs. What two layers save of the same memory counts
    once, in the first.
    """
    wires = {name: model.wire_of(layer) for name, layer in layers.items()}
    model.check_inputs(sample, wires)
    sample = map_tensors(lambda leaf: leaf.to(device), sample)
    direct = {name: sample[name] for name in inputs(wires)}
    received = autograd.Received.constant((sample, {}))
    found: list[LayerProfile] = []
    before = _Run(None, Memory())
    needed = kept(list(wires.values()))
    for index, (name, layer) in enumerate(layers.items()):
        module = model.build(layer, seed=seed, index=index).to(device).train()
        flowing = _Flowing(module, wires[name], needed[index], direct)
        last = index == len(layers) - 1
        closed = _WithLoss(flowing, loss, target) if last and loss is not None else flowing
        result, received, before = _measure(name, closed, received, before, optimizer)
        found.append(result)
    return found


class _Flowing(nn.Module):
    """A layer as a function of what flows into it; what the driver gives ``direct`` flows through no layer."""

    def __init__(self, module: nn.Module, wire: Wire, needed: Collection[str], direct: Mapping[str, Nest]) -> None:
        super().__init__()
        self.module, self.wire, self.needed, self.direct = module, wire, needed, direct

    def forward(self, flow: Flow) -> Flow:
        x, values = advance(self.module, self.wire, (flow[0], {**self.direct, **flow[1]}), self.needed)
        return x, {name: value for name, value in values.items() if value is not self.direct.get(name, self)}


class _WithLoss(nn.Module):
    def __init__(self, module: nn.Module, loss: Callable[[Any, Any], Any], target: Nest) -> None:
        super().__init__()
        self.module, self.loss, self.target = module, loss, target

    def forward(self, flow: Flow) -> Flow:
        value = self.loss(self.module(flow)[0], self.target)
        return value[0] if isinstance(value, tuple) else value, {}


@dataclass
class _Run:
    """A layer's outputs, whose graph keeps what is in ``saved`` alive and its addresses valid."""

    outputs: Nest
    saved: Memory


def _measure(
    name: str, module: nn.Module, received: autograd.Received, before: _Run, optimizer: Factory | None
) -> tuple[LayerProfile, autograd.Received, _Run]:
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    # A layer that changes its input in place must find it whole every time.
    times = [_round(module, autograd.copied(received)) for _ in range(_ROUNDS + 1)][1:]
    update = _update(module, optimizer) if optimizer is not None else 0.0
    for parameter in module.parameters():
        parameter.grad = None
    with Meter([*module.parameters(), *module.buffers()]) as meter:
        outputs, _ = _forward(module, received)
    for buffer, value in buffers:
        buffer.data.copy_(value)
    forward, backward, inputs, weights = (statistics.median(column) for column in zip(*times, strict=True))
    leaving = autograd.leave(outputs)
    result = LayerProfile(
        name,
        forward,
        backward,
        inputs,
        weights,
        activation_bytes=meter.beside(before.saved),
        parameter_bytes=sum(parameter.nbytes for parameter in module.parameters()),
        output_bytes=Memory(tensors(leaving.nest)).without(),
        update=update,
    )
    return result, leaving, _Run(outputs, meter.saved)


def _forward(module: nn.Module, received: autograd.Received) -> tuple[Nest, autograd.Entered]:
    nest, entered = autograd.enter(received)
    return module(nest), entered


def _round(module: nn.Module, received: autograd.Received) -> tuple[float, float, float, float]:
    """Seconds of forward, backward, and of the backward's halves: input gradient, weight gradient."""
    clock = Clock(any(leaf.is_cuda for leaf in tensors(received.nest)))
    clock.tick()
    outputs, entered = _forward(module, autograd.copied(received))
    clock.tick()
    saved = autograd.Saved(autograd.differentiable(outputs), entered)
    autograd.backward(saved, [torch.ones_like(out) for out in saved.outputs])
    clock.tick()
    outputs, entered = _forward(module, received)
    saved = autograd.Saved(autograd.differentiable(outputs), entered)
    clock.tick()
    _, deferred = backward_input(saved, [torch.ones_like(out) for out in saved.outputs])
    clock.tick()
    backward_weight(deferred)
    clock.tick()
    forward, backward, _, inputs, weights = clock.seconds()
    return forward, backward, inputs, weights


def _update(module: nn.Module, factory: Factory) -> float:
    """Seconds of the optimizer, on a copy of the parameters."""
    parameters = [
        parameter.detach().clone().requires_grad_() for parameter in module.parameters() if parameter.requires_grad
    ]
    if not parameters:
        return 0.0
    optimizer = factory(parameters)  # type: ignore[arg-type]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    clock = Clock(parameters[0].is_cuda)
    optimizer.step()
    clock.tick()
    for _ in range(_ROUNDS):
        optimizer.step()
        clock.tick()
    return statistics.median(clock.seconds())


class Clock:
    """Seconds between ticks: of the device's stream where that is CUDA, else of this thread."""

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        self._ticks: list[Any] = []

    def tick(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._ticks.append(event)
        else:
            self._ticks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        if not self._cuda:
            return [after - before for before, after in pairwise(self._ticks)]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(self._ticks)]
