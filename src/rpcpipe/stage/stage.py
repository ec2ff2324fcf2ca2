"""One stage of the model: its layers, and what it remembers of the micro-batches in flight.

Knows no transport, no schedule and no other stage.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from rpcpipe.model import batchnorm, rng
from rpcpipe.model.layers import Loss, Named
from rpcpipe.model.microbatch import Nest, map_tensors
from rpcpipe.model.wiring import Flow, Wiring, advance, live_names
from rpcpipe.stage import autograd, precision
from rpcpipe.stage.autograd import Gradients, StageInput
from rpcpipe.stage.boundary import cut, join, leaving, part
from rpcpipe.stage.context import MicroBatch, StepContext
from rpcpipe.stage.metrics import Metric, Sums, measure
from rpcpipe.stage.recompute import MicroBatchGraph, Recompute, SegmentRunner
from rpcpipe.stage.split_backward import WeightBackward, backward_weight
from rpcpipe.stage.weight_stash import Versions


@dataclass(frozen=True)
class StageOptions:
    """How a stage computes. ``first_layer``: its place in the model. ``loss`` is set on the last stage alone."""

    first_layer: int
    seed: int
    device: torch.device
    loss: Loss | None = None
    recompute: Recompute | None = None
    autocast: torch.dtype | None = None


class Stage:
    """Stage ``index`` of the model: some of its layers, on one device.

    ``wirings``: what the layers take and give beside the running value; ``outgoing``: the names that leave by each link
    to a later stage; ``shared``: tied parameters that an earlier stage on the same worker has as well. ``versions`` is
    set while a stream runs.
    """

    def __init__(
        self,
        index: int,
        layers: OrderedDict[str, nn.Module],
        options: StageOptions,
        *,
        wirings: Sequence[Wiring] | None = None,
        outgoing: Mapping[str, Sequence[str]] | None = None,
        shared: Collection[nn.Parameter] = (),
    ) -> None:
        self.index = index
        # A new container says it trains whatever its children do; from here on all of them agree.
        self.module = Named(layers).to(options.device).train()
        self.norms = batchnorm.deferred(self.module)
        self.first_layer, self.seed = options.first_layer, options.seed
        self.device, self.loss = options.device, options.loss
        self._shared = set(shared)
        self._autocast = options.autocast
        self._scale = 1.0
        self._wirings = wirings or [Wiring()] * len(layers)
        self._outgoing = outgoing or {}
        self._live_names = live_names(self._wirings, (name for names in self._outgoing.values() for name in names))
        # By micro-batch, how many gradients go back by each link.
        self._returns: dict[int, dict[str, int]] = {}
        self.losses: dict[int, tuple[torch.Tensor, Any]] = {}
        self.outputs: dict[int, Nest] = {}
        self.metrics: Mapping[str, Metric] = {}
        self.select: Callable[[Nest, Nest], Nest] | None = None
        self.measured: dict[int, Sums] = {}
        self.peak_in_flight = 0
        self.peak_bytes = 0
        recompute = options.recompute or Recompute("never", index, index, len(self.module))
        self.segments = SegmentRunner(self.module, recompute, self._measure)
        self.versions: Versions | None = None
        self.micro_batches: dict[int, MicroBatch] = {}
        self._saved: dict[int, MicroBatchGraph] = {}
        self._deferred: dict[int, tuple[list[WeightBackward], int]] = {}

    @property
    def in_flight(self) -> int:
        """Micro-batches whose activations are alive."""
        return len(self._saved) + len(self._deferred)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, in the model's order, but for those counted in an earlier stage here."""
        return [parameter for _, parameter in self.named_parameters]

    @property
    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The same with their names in the unsplit model."""
        return [
            pair for pair in self.module.named_parameters() if pair[1].requires_grad and pair[1] not in self._shared
        ]

    def forward(
        self, context: StepContext, micro_batch: MicroBatch, chunk: int, parcels: Mapping[str, StageInput], target: Nest
    ) -> dict[str, StageInput]:
        """Run the layers on what came by each link; returns what leaves by each."""
        if self.module.training != context.training:
            self.module.train(context.training)
        received, returns = join(parcels)
        received = self._to_device(received)
        if not context.training:
            return self._infer(context, micro_batch, chunk, received, target)
        self.micro_batches[chunk], self._returns[chunk], self._scale = micro_batch, returns, context.scale
        run = partial(self._run_segment, micro_batch, chunk, target)
        self._saved[chunk], outputs = self.segments.run(chunk, received, run)
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
        self._measure()
        return {} if self.loss is not None else self._leave(outputs)

    def _run_segment(
        self,
        micro_batch: MicroBatch,
        chunk: int,
        target: Nest,
        start: int,
        stop: int,
        flow: Flow,
        entered: autograd.GraphEntry,
        recomputing: bool,
    ) -> Nest:
        """Run layers ``start`` … ``stop - 1`` in training, and the loss behind the last one."""
        with precision.autocast(self.device, self._autocast):
            flow = self._run_layers(micro_batch, flow, entered, start, stop)
            if stop < len(self.module):
                return flow
            if self.loss is None:
                return leaving(flow, self._outgoing)
            return self._take_loss(chunk, flow[0], target, again=recomputing)

    def _leave(self, flow: Flow) -> dict[str, StageInput]:
        return part(autograd.leave(map_tensors(_to_host, flow)), self._outgoing)

    def _infer(
        self, context: StepContext, micro_batch: MicroBatch, chunk: int, received: StageInput, target: Nest
    ) -> dict[str, StageInput]:
        with torch.no_grad(), precision.autocast(self.device, self._autocast):
            flow = self._run_layers(micro_batch, received.nest, autograd.GraphEntry(), 0, len(self.module))
            if self.loss is None:
                return self._leave(leaving(flow, self._outgoing))
            output, target = flow[0], map_tensors(lambda leaf: leaf.to(self.device), target)
            if context.keep_outputs:
                self.outputs[chunk] = output if target is None or self.select is None else self.select(output, target)
            else:
                self._take_loss(chunk, output, target)
                self.measured[chunk] = measure(self.metrics, output, target)
        return {}

    def _run_layers(
        self, micro_batch: MicroBatch, flow: Flow, entered: autograd.GraphEntry, start: int, stop: int
    ) -> Flow:
        number = self.version(micro_batch)
        for at in range(start, stop):
            layer = self.module[at]
            rng.seed_layer(self.seed, micro_batch.rng_step, micro_batch.position, self.first_layer + at)
            call = layer if self.versions is None else partial(self.versions.call, layer, number)
            flow = advance(call, self._wirings[at], flow, self._live_names[at])
            if at == start and not entered.edges:
                # One output only: of several, one may lead to another and be counted twice.
                leaves = autograd.differentiable(flow)
                entered.inner = [get_gradient_edge(leaf) for leaf in leaves] if len(leaves) == 1 else []
        return flow

    def _measure(self) -> None:
        alive = sum(chain.bytes for chain in self._saved.values()) + sum(size for _, size in self._deferred.values())
        self.peak_bytes = max(self.peak_bytes, alive)

    def prepare(self, chunk: int) -> bool:
        """Recompute what ``chunk``'s backward needs first, while its gradient is under way; False if nothing."""
        return chunk in self._saved and self._saved[chunk].prepare()

    def _take_loss(self, chunk: int, outputs: Nest, target: Nest, *, again: bool = False) -> torch.Tensor:
        assert self.loss is not None
        value = self.loss(outputs, map_tensors(lambda leaf: leaf.to(self.device), target))
        value, count = value if isinstance(value, tuple) else (value, None)
        if not isinstance(value, torch.Tensor) or value.dim():
            shape = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
            raise TypeError(
                f"loss must return a scalar tensor (the mean), or (sum, count), not {shape};"
                " reduce it, for instance by .mean()"
            )
        if not again:
            self.losses[chunk] = (value.detach(), count)
        return value

    def version(self, micro_batch: MicroBatch) -> int:
        """Of the weights that ``micro_batch`` is computed with; -1 where they have only one."""
        return -1 if self.versions is None or micro_batch.group is None else self.versions.of(micro_batch.group)

    def backward(self, chunk: int, grads: Mapping[str, Gradients]) -> dict[str, Gradients]:
        """Run the full backward of ``chunk``. Accumulates into ``.grad``; returns the input gradients, by link."""
        found = self._saved[chunk].backward(self._output_grads(chunk, grads))
        del self._saved[chunk]
        return self._send_back(chunk, found)

    def _send_back(self, chunk: int, grads: Gradients) -> dict[str, Gradients]:
        return cut([None if grad is None else _to_host(grad) for grad in grads], self._returns.pop(chunk))

    def loss_counts(self, chunk: int) -> bool:
        """Is the loss of ``chunk`` finite, and does anything count in it? True on a stage without a loss."""
        if self.loss is None:
            return True
        value, count = self.losses[chunk]
        return bool(value.isfinite()) and (count is None or float(count) > 0)

    def give_up(self, chunk: int) -> list[str]:
        """Forget ``chunk``'s activations without a backward; the links by which its gradients would go back."""
        del self._saved[chunk]
        return list(self._returns.pop(chunk))

    def backward_input(self, chunk: int, grads: Mapping[str, Gradients]) -> dict[str, Gradients]:
        """The half of the backward that earlier stages wait for."""
        found, rest, size = self._saved[chunk].backward_input(self._output_grads(chunk, grads))
        del self._saved[chunk]
        self._deferred[chunk] = rest, size
        return self._send_back(chunk, found)

    def backward_weight(self, chunk: int) -> None:
        """The other half: parameters' ``.grad`` grow."""
        for deferred in self._deferred.pop(chunk)[0]:
            backward_weight(deferred)

    def _output_grads(self, chunk: int, grads: Mapping[str, Gradients]) -> Gradients:
        if self.loss is None:
            return [None if grad is None else grad.to(self.device) for link in self._outgoing for grad in grads[link]]
        weight = _weight(self.micro_batches[chunk], self.losses[chunk][1])
        # In this order, as autograd has it for scaler.scale(loss * weight).backward().
        return [torch.full_like(loss, self._scale).mul_(weight) for loss in self._saved[chunk].outputs]

    def _to_device(self, received: StageInput) -> StageInput:
        if self.device.type == "cpu":
            return received
        return StageInput(map_tensors(lambda leaf: leaf.to(self.device), received.nest), received.wants_grad)

    def loss_values(self) -> dict[int, tuple[float, float | None]]:
        """(value, count) per micro-batch so far; waits for the device."""
        return {
            chunk: (float(value), None if count is None else float(count))
            for chunk, (value, count) in self.losses.items()
        }

    def take_losses(self) -> dict[int, tuple[float, float | None]]:
        """``loss_values`` of the micro-batches whose backward is done, which are then forgotten."""
        done = {chunk: loss for chunk, loss in self.losses.items() if chunk not in self._saved}
        self.losses = {chunk: loss for chunk, loss in self.losses.items() if chunk in self._saved}
        return {
            chunk: (float(value), None if count is None else float(count)) for chunk, (value, count) in done.items()
        }

    def reset(self) -> None:
        """Forget the step before, all that a failed one left included."""
        self.losses, self.outputs, self.measured, self.peak_in_flight, self.peak_bytes = {}, {}, {}, 0, 0
        self.segments.recomputed = 0
        self.micro_batches, self._returns = {}, {}
        self._saved.clear()
        self._deferred.clear()
        for norm in self.norms:
            norm.clear()
        for parameter in self.module.parameters():
            parameter.grad = None


def _weight(micro_batch: MicroBatch, count: Any) -> float:
    """A loss that is a mean counts by the micro-batch's share of the batch; sums are divided at the end."""
    if count is None:
        return micro_batch.weight
    if micro_batch.group is None:
        return 1.0
    if not micro_batch.alone:
        raise TypeError(
            "under pipedream-2bw the loss must return the mean, not (sum, count): a batch's count is not known"
            " when its first micro-batch is backpropagated; schedule='pipedream' takes both"
        )
    return 1.0 / float(count)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Tensors travel through host memory; on the CPU this is the tensor itself."""
    return tensor.cpu()
