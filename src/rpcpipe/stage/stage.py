"""One stage of the model: its layers, and the state of its micro-batches in flight.

A stage does not depend on the transport, the schedule or other stages.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from rpcpipe.errors import ModelError, ScheduleError
from rpcpipe.model import batchnorm, losses, rng
from rpcpipe.model.layers import Loss
from rpcpipe.model.microbatch import Nest, map_tensors
from rpcpipe.model.names import Named
from rpcpipe.model.sendable import sendable
from rpcpipe.model.wiring import Flow, Wiring, advance, live_names
from rpcpipe.stage import autograd, precision
from rpcpipe.stage.audit import Audit
from rpcpipe.stage.autograd import Gradients, StageInput
from rpcpipe.stage.boundary import cut, join, leaving, part
from rpcpipe.stage.context import MicroBatch, StepContext
from rpcpipe.stage.metrics import Metrics, Sums, measure
from rpcpipe.stage.modes import Modes
from rpcpipe.stage.outputs import Outputs
from rpcpipe.stage.recompute import MicroBatchGraph, Recompute, SegmentRunner
from rpcpipe.stage.split_backward import WeightBackward, backward_weight
from rpcpipe.stage.weight_stash import Versions


@dataclass(frozen=True)
class StageOptions:
    """How a stage computes.

    ``first_layer`` is the index in the model of the stage's first layer. Only the last stage has a ``loss``.
    """

    first_layer: int
    seed: int
    device: torch.device
    loss: Loss | None = None
    recompute: Recompute | None = None
    autocast: torch.dtype | None = None


class Stage:
    """Stage ``index`` of the model: consecutive layers on one device.

    ``wirings``: the values that each layer takes and gives beside the running value; ``outgoing``: the names of the
    values that leave by each link to a later stage; ``shared``: tied parameters that an earlier stage on the same
    worker also holds; ``constant``: (layer, name) of buffers that other stages may have too, so that no forward may
    change them. ``versions`` is set while a stream runs.
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
        constant: Collection[tuple[str, str]] = (),
    ) -> None:
        self.index = index
        self.module = Named(layers).to(options.device)
        self.modes = Modes(self.module)
        self.norms = batchnorm.deferred(self.module)
        self.first_layer, self.seed = options.first_layer, options.seed
        self.device, self.loss = options.device, options.loss
        self._shared = set(shared)
        self._constant = [
            (layers[name].get_submodule(path.rpartition(".")[0]), f"{name}.{path}") for name, path in constant
        ]
        self._autocast = options.autocast
        self._context = StepContext(-1, 0, False, ())
        self._wirings = wirings or [Wiring()] * len(layers)
        self._outgoing = outgoing or {}
        self.leaving = Outputs(self.module)
        self._live_names = live_names(self._wirings, (name for names in self._outgoing.values() for name in names))
        # By micro-batch, the number of gradients to send back by each link.
        self._returns: dict[int, dict[str, int]] = {}
        self.losses: dict[int, tuple[torch.Tensor, Any]] = {}
        self.outputs: dict[int, Nest] = {}
        self.metrics: Metrics = {}
        self.select: Callable[[Nest, Nest], Nest] | None = None
        self.measured: dict[int, Sums] = {}
        self.peak_in_flight = 0
        self.peak_bytes = 0
        recompute = options.recompute or Recompute("never", index, index, len(self.module))
        self.audit = Audit(self.module)
        self.segments = SegmentRunner(self.module, recompute, self._measure, self.audit, self._leaves)
        self.versions: Versions | None = None
        self.micro_batches: dict[int, MicroBatch] = {}
        self._saved: dict[int, MicroBatchGraph] = {}
        self._deferred: dict[int, tuple[list[WeightBackward], int]] = {}

    @property
    def in_flight(self) -> int:
        """Number of micro-batches whose activations are in memory."""
        return len(self._saved) + len(self._deferred)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Trainable parameters in the model's order, without those that an earlier stage on this worker counts."""
        return [parameter for _, parameter in self.named_parameters]

    @property
    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """``parameters`` as (name in the unsplit model, parameter)."""
        return [
            pair for pair in self.module.named_parameters() if pair[1].requires_grad and pair[1] not in self._shared
        ]

    def forward(
        self, context: StepContext, micro_batch: MicroBatch, chunk: int, parcels: Mapping[str, StageInput], target: Nest
    ) -> dict[str, StageInput]:
        """Run the layers, and the loss on the last stage, for micro-batch ``chunk``; return the outputs by link.

        ``parcels`` holds the inputs by link. The activations are kept for the backward if ``context`` is a training
        step. A stage with a loss returns no outputs. Raises ModelError if the loss returns neither a scalar tensor nor
        (sum, count).
        """
        self.modes.switch(training=context.training)
        received, returns = join(parcels)
        received = self._to_device(received)
        if not context.training:
            return self._infer(context, micro_batch, chunk, received, target)
        self.micro_batches[chunk], self._returns[chunk], self._context = micro_batch, returns, context
        run = partial(self._run_segment, micro_batch, chunk, target)
        with nullcontext() if self.versions is None else self.versions.forwarding(micro_batch):
            self._saved[chunk], outputs = self.segments.run(chunk, received, run)
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
        self._measure()
        return {} if self.loss is not None else self._leave(chunk, outputs)

    def _run_segment(
        self,
        micro_batch: MicroBatch,
        chunk: int,
        target: Nest,
        start: int,
        stop: int,
        flow: Flow,
        entry: autograd.GraphEntry,
        dropping: bool,
    ) -> Nest:
        """Run layers ``start`` … ``stop - 1`` in training, and the loss after the stage's last layer.

        ``dropping``: the activations are not kept. The loss is then left to the recomputation: it may have a state.
        """
        with precision.autocast(self.device, self._autocast):
            flow = self._run_layers(micro_batch, flow, entry, start, stop, dropping=dropping)
            if stop < len(self.module):
                return flow
            if self.loss is None:
                return leaving(flow, self._outgoing)
            outputs = flow if dropping else self._take_loss(chunk, flow[0], target)
            if self._context.measures or self._context.keep_outputs:
                self._keep(chunk, flow[0], target)
            return outputs

    def _keep(self, chunk: int, output: Nest, target: Nest) -> None:
        """Keep what the step wants of the outputs of training; a recomputation adds nothing."""
        if chunk in self.measured:
            return
        output = map_tensors(torch.Tensor.detach, output)
        with torch.no_grad():
            target = map_tensors(lambda leaf: leaf.to(self.device), target)
            self.measured[chunk] = measure(self.metrics, output, target) if self._context.measures else {}
        if self._context.keep_outputs:
            self.outputs[chunk] = self.leaving.value(output, chunk)

    def _leave(self, chunk: int, flow: Flow) -> dict[str, StageInput]:
        return part(autograd.leave(self.leaving.flow(flow, chunk)), self._outgoing)

    def _infer(
        self, context: StepContext, micro_batch: MicroBatch, chunk: int, received: StageInput, target: Nest
    ) -> dict[str, StageInput]:
        with torch.no_grad(), precision.autocast(self.device, self._autocast), autograd.aliases_kept(received):
            flow = self._run_layers(micro_batch, received.nest, autograd.GraphEntry(), 0, len(self.module))
            if self.loss is None:
                return self._leave(chunk, leaving(flow, self._outgoing))
            output, target = flow[0], map_tensors(lambda leaf: leaf.to(self.device), target)
            if context.keep_outputs:
                selected = output if target is None or self.select is None else self.select(output, target)
                self.outputs[chunk] = self.leaving.value(selected, chunk)
            else:
                self._take_loss(chunk, output, target)
                self.measured[chunk] = measure(self.metrics, output, target)
        return {}

    def _run_layers(
        self,
        micro_batch: MicroBatch,
        flow: Flow,
        entry: autograd.GraphEntry,
        start: int,
        stop: int,
        *,
        dropping: bool = False,
    ) -> Flow:
        version, before = self.version(micro_batch), self._constant_versions()
        for index in range(start, stop):
            layer = self.module[index]
            if dropping and index > start:
                # With a graph, as it is recomputed, but only of one layer at a time.
                flow, _ = autograd.enter(autograd.leave(flow))
            rng.seed_layer(self.seed, micro_batch.rng_step, micro_batch.position, self.first_layer + index)
            call = layer if self.versions is None else partial(self.versions.call, layer, version)
            flow = advance(call, self._wirings[index], flow, self._live_names[index])
            if index == start and not entry.edges:
                # Only for a single output: one of several might depend on another, and be counted twice.
                leaves = autograd.differentiable(flow)
                if len(leaves) == 1:
                    entry.inner, entry.hooks = [get_gradient_edge(leaves[0])], [autograd.hooks_of(leaves[0])]
        self._check_constant(before)
        return flow

    def _constant_versions(self) -> list[tuple[int, int]]:
        buffers = [owner.get_buffer(name.rpartition(".")[2]) for owner, name in self._constant]
        return [(id(buffer), buffer._version) for buffer in buffers]

    def _check_constant(self, before: Sequence[tuple[int, int]]) -> None:
        """Raise ModelError if a buffer that other stages have too has changed."""
        for (_, name), old, new in zip(self._constant, before, self._constant_versions(), strict=True):
            if old != new:
                raise ModelError(
                    f"{name} is a buffer that several layers share, and the layer's forward changes it, which the other"
                    " stages would not see; give each layer a buffer of its own"
                )

    def _measure(self) -> None:
        saved = sum(graph.bytes for graph in self._saved.values())
        deferred = sum(size for _, size in self._deferred.values())
        self.peak_bytes = max(self.peak_bytes, saved + deferred)

    def prepare(self, chunk: int) -> bool:
        """Recompute the segment that ``chunk``'s backward needs first; return False if there is none to recompute.

        A worker calls this while it waits for the gradient.
        """
        return chunk in self._saved and self._saved[chunk].prepare()

    def _take_loss(self, chunk: int, outputs: Nest, target: Nest) -> torch.Tensor:
        assert self.loss is not None
        value = self.loss(outputs, map_tensors(lambda leaf: leaf.to(self.device), target))
        value, count = losses.value_and_count(value)
        losses.check_graph(value, outputs)
        for _, other in itertools.islice(self.losses.values(), 1):
            losses.check_alike(count, other)
        self.losses[chunk] = (value.detach(), count)
        return value

    def version(self, micro_batch: MicroBatch) -> int:
        """Return the version of the weights for ``micro_batch``; -1 outside a stream, where there is only one."""
        return -1 if self.versions is None or micro_batch.group is None else self.versions.of(micro_batch.group)

    def backward(self, chunk: int, grads: Mapping[str, Gradients]) -> dict[str, Gradients]:
        """Run the full backward of ``chunk``: accumulate into ``.grad`` and return the input gradients by link."""
        run = partial(self._saved[chunk].backward, self._output_grads(chunk, grads))
        if self.versions is not None and self.audit.recomputes:
            input_grads = self.versions.run(self.module, self.version(self.micro_batches[chunk]), run)
        else:
            input_grads = run()
        del self._saved[chunk]
        return self._send_back(chunk, input_grads)

    def _send_back(self, chunk: int, grads: Gradients) -> dict[str, Gradients]:
        return cut([None if grad is None else _to_host(grad) for grad in grads], self._returns.pop(chunk))

    def loss_counts(self, chunk: int) -> bool:
        """Return whether ``chunk``'s loss is finite and its count positive; True on a stage without a loss."""
        if self.loss is None:
            return True
        self.prepare(chunk)  # a recomputation computes the loss
        value, count = self.losses[chunk]
        return bool(value.isfinite()) and (count is None or float(count) > 0)

    def give_up(self, chunk: int) -> list[str]:
        """Free ``chunk``'s activations without a backward; return the links for its input gradients."""
        del self._saved[chunk]
        return list(self._returns.pop(chunk))

    def backward_input(self, chunk: int, grads: Mapping[str, Gradients]) -> dict[str, Gradients]:
        """Run the first half of ``chunk``'s backward, for which earlier stages wait; return input gradients by link."""
        input_grads, deferred, size = self._saved[chunk].backward_input(self._output_grads(chunk, grads))
        del self._saved[chunk]
        self._deferred[chunk] = deferred, size
        return self._send_back(chunk, input_grads)

    def backward_weight(self, chunk: int) -> None:
        """Run the second half of ``chunk``'s backward: accumulate the weight gradients into ``.grad``."""
        with self.audit.backward("weight", alone=False):
            for deferred in self._deferred.pop(chunk)[0]:
                backward_weight(deferred)

    def _output_grads(self, chunk: int, grads: Mapping[str, Gradients]) -> Gradients:
        if self.loss is None:
            return [None if grad is None else grad.to(self.device) for link in self._outgoing for grad in grads[link]]
        outputs = self._saved[chunk].outputs  # a recomputation computes the loss
        loss, count = self.losses[chunk]
        if not outputs:
            raise ModelError(
                "the loss does not require a gradient: no trainable parameter leads to it, so nothing would be trained;"
                " look for a detach(), an argmax, a layer under no_grad or frozen weights between the layers and it"
            )
        weight = _weight(self.micro_batches[chunk], count)
        # scale * weight, in the order in which autograd multiplies for scaler.scale(loss * weight).backward().
        return [torch.full_like(loss, self._context.scale).mul_(weight) for _ in range(outputs)]

    def _leaves(self) -> Collection[torch.Tensor]:
        """Return the parameters as the leaves of this stage's graphs."""
        return set(self.module.parameters()) if self.versions is None else self.versions.leaves

    def _to_device(self, received: StageInput) -> StageInput:
        if self.device.type == "cpu":
            return received
        return replace(received, nest=map_tensors(lambda leaf: leaf.to(self.device), received.nest))

    def loss_values(self) -> dict[int, tuple[float, float | None]]:
        """Return (value, count) of the loss by micro-batch; waits for the device."""
        return _floats(self.losses)

    def take_losses(self) -> dict[int, tuple[float, float | None]]:
        """Return ``loss_values`` of the micro-batches whose backward is done, and remove those losses."""
        done = {chunk: loss for chunk, loss in self.losses.items() if chunk not in self._saved}
        self.losses = {chunk: loss for chunk, loss in self.losses.items() if chunk in self._saved}
        return _floats(done)

    def reset(self) -> None:
        """Discard the state of the previous step, including what a failed step left behind."""
        self.losses, self.outputs, self.measured, self.peak_in_flight, self.peak_bytes = {}, {}, {}, 0, 0
        self.segments.recomputed = 0
        self.micro_batches, self._returns = {}, {}
        self._saved.clear()
        self._deferred.clear()
        for norm in self.norms:
            norm.clear()
        for parameter in self.module.parameters():
            parameter.grad = None


def _floats(losses: Mapping[int, tuple[torch.Tensor, Any]]) -> dict[int, tuple[float, float | None]]:
    return {chunk: (float(value), None if count is None else float(count)) for chunk, (value, count) in losses.items()}


def _weight(micro_batch: MicroBatch, count: Any) -> float:
    """Return the factor of the micro-batch's loss: for a mean, the micro-batch's share of the batch.

    A sum has factor 1, as it is divided by the batch's count at the end; in a stream it is divided here. Raises
    ScheduleError for a sum where an update in a stream covers several micro-batches.
    """
    if count is None:
        return micro_batch.weight
    if micro_batch.group is None:
        return 1.0
    if not micro_batch.alone:
        raise ScheduleError(
            "under pipedream-2bw the loss must return the mean, not (sum, count): a batch's count is not known"
            " when its first micro-batch is backpropagated; schedule='pipedream' takes both"
        )
    return 1.0 / float(count)


def _to_host(gradient: torch.Tensor) -> torch.Tensor:
    """Return ``gradient`` in host memory, as it is sent; a CPU tensor is returned itself."""
    return sendable(gradient, "the gradient of a stage's input").cpu()
