"""Measure or estimate the cost of every layer, from which the model's partition is computed.

``profile`` runs the layers one by one. ``estimate`` is for models that fit on no available machine: it
counts the operations on the meta device and divides them by the operations per second of a device.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rpcpipe.model import layers as model
from rpcpipe.model.microbatch import Nest, map_tensors, tensors
from rpcpipe.model.wiring import Flow, Wiring, advance, live_names, required_inputs
from rpcpipe.planning.layer_cost import LayerCost
from rpcpipe.stage import autograd, gradients, precision
from rpcpipe.stage.activation_memory import Memory, saved_by_graph
from rpcpipe.stage.optimizer import Factory, Parameters, make
from rpcpipe.stage.peak_memory import PeakMemory
from rpcpipe.stage.split_backward import backward_input, backward_weight

Cast = Callable[[], AbstractContextManager[None]]

_ROUNDS = 5
_CACHES = 64 << 20  # bytes: more than a core's share of the caches


def profile(
    layers: Mapping[str, model.Layer],
    sample: Nest,
    *,
    loss: Callable[[Any, Any], Any] | None = None,
    target: Nest = None,
    optimizer: Factory | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
) -> list[LayerCost]:
    """Run every layer on its inputs for ``sample``, one micro-batch; return their costs in seconds and bytes.

    With ``loss`` and ``target`` the last layer's cost includes the loss; with ``optimizer`` the update is timed, and
    its state counted, too. ``autocast``: as ``Pipeline``'s. Of LayerSpecs only one is in memory at a time. Memory that
    two consecutive layers save for their backwards counts once, for the first of them. Copies are run, in the modes
    that the modules have: modules, ``loss``, ``sample`` and the global random numbers stay as they are. Raises
    ArgumentError if ``sample`` lacks a name.
    """
    rounds = _ROUNDS + 1

    def build(index: int, layer: model.Layer) -> nn.Module:
        module = model.build(layer, seed=seed, index=index)
        return (copy.deepcopy(module) if module is model.unwired(layer) else module).to(device)

    with _same_random_numbers(device):
        measure = _Measure(
            Clock, rounds, optimizer, functools.partial(precision.autocast, torch.device(device), autocast)
        )
        return _walk(layers, sample, device, _Closing(loss, target), build, measure)


def estimate(
    layers: Mapping[str, model.Layer],
    sample: Nest,
    *,
    flops: float,
    loss: Callable[[Any, Any], Any] | None = None,
    target: Nest = None,
) -> list[LayerCost]:
    """Return the costs of ``profile`` without running a layer: operations on the meta device ÷ ``flops`` per second.

    Only matrix products and convolutions count, as in torch's FlopCounterMode. Memory-bound operations do
    not, so the seconds are lower bounds. Equal LayerSpecs are counted once.
    """
    counter = FlopCounterMode(display=False)
    with counter, _same_random_numbers("meta"):
        measure = _Measure(lambda cuda: _Count(counter, flops), 1, repeats=True)
        return _walk(layers, sample, "meta", _Closing(loss, target), lambda _, layer: _on_meta(layer), measure)


@contextmanager
def _same_random_numbers(device: torch.device | str) -> Iterator[None]:
    """Put the global generators of Python and torch, in use on ``device``, back to where they were."""
    place, state = torch.device(device), random.getstate()
    try:
        with torch.random.fork_rng([place] if place.type == "cuda" else []):
            yield
    finally:
        random.setstate(state)


def _on_meta(layer: model.Layer) -> nn.Module:
    """Return the layer's module, or a copy of the given module, on the meta device."""
    layer = model.unwired(layer)
    if isinstance(layer, model.LayerSpec):
        with torch.device("meta"):
            return layer.build()
    owned = [*layer.parameters(), *layer.buffers()]
    memo = {id(tensor): tensor.data.to("meta") for tensor in owned}
    for tensor in layer.parameters():
        memo[id(tensor)] = nn.Parameter(memo[id(tensor)], requires_grad=tensor.requires_grad)
    return copy.deepcopy(layer, memo)


def _walk(
    layers: Mapping[str, model.Layer],
    sample: Nest,
    device: torch.device | str,
    closing: _Closing,
    build: Callable[[int, model.Layer], nn.Module],
    measure: _Measure,
) -> list[LayerCost]:
    """Return the costs of all layers; ``build`` makes each module, and ``measure`` runs it on its inputs."""
    wirings = {name: model.wiring_of(layer) for name, layer in layers.items()}
    model.check_inputs(sample, wirings)
    sample = map_tensors(lambda leaf: leaf.detach().to(device, copy=True), sample)
    direct = {name: sample[name] for name in required_inputs(wirings)}
    received = autograd.StageInput.constant((sample, {}))
    costs: list[LayerCost] = []
    known: dict[Any, tuple[LayerCost, autograd.StageInput, _Run]] = {}
    before: _Run = _Run(None, Memory())
    previous: Any = None
    needed = live_names(list(wirings.values()))
    for index, (name, layer) in enumerate(layers.items()):
        last = index == len(layers) - 1
        # A layer's cost depends on its inputs, and on which of these the layer before has saved.
        identity = _identity(layer), wirings[name], needed[index], last
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in tensors(received.nest))
        key = (identity, previous, shapes) if measure.repeats else index
        if key not in known:
            module = closing.around(_Flowing(build(index, layer), wirings[name], needed[index], direct), last)
            known[key] = measure(name, module, received, before)
        cost, received, before = known[key] if measure.repeats else known.pop(key)
        costs.append(dataclasses.replace(cost, name=name))
        previous = identity
    return costs


def _identity(layer: model.Layer) -> Any:
    """Return a key that is equal for layers of equal cost: a spec's class and arguments, else the module's id."""
    layer = model.unwired(layer)
    if isinstance(layer, model.LayerSpec):
        try:
            identity = layer.cls, layer.args, tuple(sorted(layer.kwargs.items()))
            hash(identity)
            return identity
        except TypeError:
            pass  # an argument cannot be hashed or compared
    return id(layer)


@dataclass
class _Closing:
    """Appends the loss to the last layer."""

    loss: Callable[[Any, Any], Any] | None
    target: Nest

    def around(self, module: _Flowing, last: bool) -> nn.Module:
        if not last or self.loss is None:
            return module
        device = next((leaf.device for leaf in module.parameters()), None)
        return _WithLoss(module, copy.deepcopy(self.loss), map_tensors(lambda leaf: leaf.to(device), self.target))


class _Flowing(nn.Module):
    """A layer as a function of its Flow; values that the driver sends ``direct`` are not part of the Flow."""

    def __init__(self, module: nn.Module, wiring: Wiring, needed: Collection[str], direct: Mapping[str, Nest]) -> None:
        super().__init__()
        self.module, self.wiring, self.needed, self.direct = module, wiring, needed, direct

    def forward(self, flow: Flow) -> Flow:
        x, values = advance(self.module, self.wiring, (flow[0], {**self.direct, **flow[1]}), self.needed)
        return x, {name: value for name, value in values.items() if value is not self.direct.get(name, self)}


class _WithLoss(nn.Module):
    """The last layer with the loss, or the sum of a loss that returns (sum, count), as its running value."""

    def __init__(self, module: nn.Module, loss: Callable[[Any, Any], Any], target: Nest) -> None:
        super().__init__()
        self.module, self.loss, self.target = module, loss, target

    def forward(self, flow: Flow) -> Flow:
        value = self.loss(self.module(flow)[0], self.target)
        return value[0] if isinstance(value, tuple) else value, {}


@dataclass
class _Run:
    """A layer's outputs. Their graph keeps the memory in ``saved`` alive, so that its addresses stay valid."""

    outputs: Nest
    saved: Memory


@dataclass
class _Measure:
    """Measures one layer in ``rounds`` runs, of which the first is a warm-up if there are several.

    ``cast``: returns what forwards run in. ``repeats``: equal layers have equal costs, so that each is measured once.
    """

    clock: Callable[[bool], Timer]
    rounds: int
    optimizer: Factory | None = None
    cast: Cast = nullcontext
    repeats: bool = False

    def __call__(
        self, name: str, module: nn.Module, received: autograd.StageInput, before: _Run
    ) -> tuple[LayerCost, autograd.StageInput, _Run]:
        """Return the layer's cost, its outputs as the next layer's input, and the run that saved them."""
        buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
        cuda = any(leaf.is_cuda for leaf in tensors(received.nest))
        # A layer may change its input in place, so that every round needs a copy.
        times = [_round(module, autograd.copied(received), self.clock(cuda), self.cast) for _ in range(self.rounds)]
        peak = _peak(module, autograd.copied(received), self.cast)
        update, state = (0.0, None) if self.optimizer is None else _update(module, self.optimizer)
        for parameter in module.parameters():
            parameter.grad = None
        outputs, _ = _forward(module, received, self.cast)
        saved = saved_by_graph(tensors(outputs))
        known = Memory([*module.parameters(), *module.buffers()])
        for buffer, value in buffers:
            buffer.data.copy_(value)
        warm = times[len(times) > 1 :]
        forward, backward, inputs, weights = (statistics.median(column) for column in zip(*warm, strict=True))
        leaving = autograd.leave(outputs)
        cost = LayerCost(
            name,
            forward,
            backward,
            inputs,
            weights,
            activation_bytes=saved.without(known, before.saved),
            parameter_bytes=sum(parameter.nbytes for parameter in module.parameters()),
            output_bytes=Memory(tensors(leaving.nest)).without(),
            update=update,
            state_bytes=state,
            peak_bytes=peak,
        )
        return cost, leaving, _Run(outputs, saved)


def _forward(module: nn.Module, received: autograd.StageInput, cast: Cast) -> tuple[Nest, autograd.GraphEntry]:
    nest, entry = autograd.enter(received)
    with cast():
        return module(nest), entry


def _peak(module: nn.Module, received: autograd.StageInput, cast: Cast) -> int:
    """Return the most bytes at once of a forward and its backward, gradients of parameters being there already."""
    grads = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    memory = PeakMemory([*module.parameters(), *module.buffers(), *grads, *tensors(received.nest)])
    with memory:
        outputs, entry = _forward(module, received, cast)
        ones = _ones(outputs)
        saved = autograd.Saved.of(outputs, entry)
        del outputs, entry
        autograd.backward(saved, ones)
    return memory.peak


def _round(
    module: nn.Module, received: autograd.StageInput, clock: Timer, cast: Cast
) -> tuple[float, float, float, float]:
    """Return the seconds of forward, full backward, input gradient and weight gradient."""
    clock.tick()
    outputs, entry = _forward(module, autograd.copied(received), cast)
    clock.tick()
    autograd.backward(autograd.Saved.of(outputs, entry), _ones(outputs))
    clock.tick()
    outputs, entry = _forward(module, received, cast)
    clock.tick()
    _, deferred = backward_input(autograd.Saved.of(outputs, entry), _ones(outputs))
    clock.tick()
    backward_weight(deferred)
    clock.tick()
    forward, backward, _, inputs, weights = clock.seconds()
    return forward, backward, inputs, weights


def _ones(outputs: Nest) -> autograd.Gradients:
    return [torch.ones_like(leaf) for leaf in autograd.differentiable(outputs)]


def _update(module: nn.Module, factory: Factory) -> tuple[float, int]:
    """Return the median seconds of the gradients' norms and an optimizer step, and the bytes of its state.

    They are those of a copy of the parameters.
    """
    parameters = Parameters(
        (name, nn.Parameter(parameter.detach().clone()))
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    )
    if not parameters:
        return 0.0, 0
    optimizer = make(factory, parameters)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)  # Adam takes twice as long for zeros
    clock = Clock(parameters[0].is_cuda)
    optimizer.step()
    others = torch.empty(_CACHES // 4)
    for _ in range(_ROUNDS):
        others.zero_()  # an update finds nothing of what it needs in the caches
        clock.tick()
        gradients.norms(parameters)
        optimizer.step()
        clock.tick()
    state = Memory(leaf for entries in optimizer.state.values() for leaf in tensors(entries))
    return statistics.median(clock.seconds()[::2]), state.without()


class Timer(Protocol):
    """Measures the seconds between ticks."""

    def tick(self) -> None: ...

    def seconds(self) -> list[float]: ...


class _Count:
    """Timer that converts the operations between ticks into seconds, at ``flops`` operations per second."""

    def __init__(self, counter: FlopCounterMode, flops: float) -> None:
        self._counter, self._flops = counter, flops
        self._ticks: list[int] = []

    def tick(self) -> None:
        self._ticks.append(self._counter.get_total_flops())

    def seconds(self) -> list[float]:
        return [(after - before) / self._flops for before, after in pairwise(self._ticks)]


class Clock:
    """Timer of wall-clock time: between events in the current stream on CUDA, else in this thread."""

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
