"""Activation checkpointing (Chen et al., "Training Deep Nets with Sublinear Memory Cost", section 3).

A stage's forward is a sequence of segments, runs of consecutive layers. A segment keeps its activations, or keeps
only its input and is run again before its backward. ``Recompute`` decides between the two; ``SegmentRunner`` runs
the segments.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import nn

from rpcpipe.errors import ArgumentError, ModelError
from rpcpipe.model import rng
from rpcpipe.model.microbatch import Nest, map_tensors, tensors
from rpcpipe.stage import autograd
from rpcpipe.stage.activation_memory import Memory, saved_by_graph
from rpcpipe.stage.attributes import Attributes
from rpcpipe.stage.audit import Audit
from rpcpipe.stage.autograd import Gradients
from rpcpipe.stage.buffers import ForwardBuffers, Values
from rpcpipe.stage.split_backward import WeightBackward, backward_input

Checkpoint = str | float | Callable[[int, int], bool]

MODES = ("never", "except_last", "always")


class Run(NamedTuple):
    """Layers ``start`` … ``stop - 1`` of a stage; ``drop``: their activations are dropped and recomputed."""

    start: int
    stop: int
    drop: bool


def check(checkpoint: Checkpoint) -> None:
    """Raise ArgumentError unless ``checkpoint`` is a mode, a ratio, or a function of (stage, chunk)."""
    ratio = isinstance(checkpoint, (int, float)) and not isinstance(checkpoint, bool) and 0 <= checkpoint <= 1
    if not (ratio or checkpoint in MODES or callable(checkpoint)):
        raise ArgumentError(
            f"checkpoint must be one of {', '.join(map(repr, MODES))}, a ratio from 0 to 1, or a function of"
            f" (stage, chunk), not {checkpoint!r}"
        )


def is_ratio(checkpoint: Checkpoint) -> bool:
    """Return whether a stage's layers are run in several segments, some of which are recomputed."""
    return isinstance(checkpoint, (int, float)) and 0 < checkpoint < 1


class Recompute:
    """Decides which layers of one stage with ``layers`` layers are recomputed."""

    def __init__(self, checkpoint: Checkpoint, stage: int, last_stage: int, layers: int) -> None:
        self._checkpoint, self._stage, self._last_stage, self._layers = checkpoint, stage, last_stage, layers
        self._learnt: list[Run] | None = None

    @property
    def learns(self) -> bool:
        """Whether the next forward must measure each layer's costs, with one run per layer."""
        return is_ratio(self._checkpoint) and self._learnt is None

    def runs(self, chunk: int) -> list[Run]:
        """Return the runs of layers in which the stage computes the forward of micro-batch ``chunk``."""
        if self.learns:
            return [Run(layer, layer + 1, drop=False) for layer in range(self._layers)]
        return self._learnt or [Run(0, self._layers, drop=self._drops(chunk))]

    def _drops(self, chunk: int) -> bool:
        mode = self._checkpoint
        if callable(mode):
            return bool(mode(self._stage, chunk))
        if mode == "except_last":
            return self._stage < self._last_stage
        return mode in ("always", 1)

    def learn(self, costs: Sequence[tuple[int, float]]) -> None:
        """Choose the layers to recompute from ``costs``, each layer's (bytes, seconds)."""
        assert not isinstance(self._checkpoint, str)
        assert not callable(self._checkpoint)
        self._learnt = merge(select(costs, float(self._checkpoint)))


def select(costs: Sequence[tuple[int, float]], ratio: float) -> list[bool]:
    """Return per layer whether to recompute it: most bytes per second first, up to ``ratio`` of all bytes.

    ``costs`` holds each layer's (activation bytes, forward seconds).
    """
    left = ratio * sum(size for size, _ in costs)
    chosen = [False] * len(costs)

    def bytes_per_second(layer: int) -> float:
        return costs[layer][0] / max(costs[layer][1], 1e-9)

    for layer in sorted(range(len(costs)), key=bytes_per_second, reverse=True):
        if 0 < costs[layer][0] <= left:
            left -= costs[layer][0]
            chosen[layer] = True
    return chosen


def merge(chosen: Sequence[bool]) -> list[Run]:
    """Return the runs of consecutive layers with the same choice."""
    runs, start = [], 0
    for drop, group in groupby(chosen):
        stop = start + len(list(group))
        runs.append(Run(start, stop, drop))
        start = stop
    return runs


# (first layer, one past the last layer, nest, its graph entry, whether activations are dropped) -> outputs
Forward = Callable[[int, int, Nest, autograd.GraphEntry, bool], Nest]


@dataclass
class Dropped:
    """What a segment's recomputation starts from: its input, and the state that its forward has changed since."""

    received: autograd.StageInput
    buffers: Values
    attributes: Attributes
    random: rng.PythonState


@dataclass
class Segment:
    """A run of layers for one micro-batch: its graph in ``saved``, or what recomputes it in ``dropped``."""

    run: Run
    forward: Forward
    saved: autograd.Saved | None = None
    dropped: Dropped | None = None
    bytes: int = 0


class MicroBatchGraph:
    """The segments of one micro-batch, kept by a stage from the forward to the backward."""

    def __init__(self, segments: list[Segment], replay: Callable[[Segment], None], audit: Audit) -> None:
        self._segments = segments
        self._replay = replay
        self._audit, self._forwards = audit, audit.forwards

    @property
    def bytes(self) -> int:
        """Bytes of the activations in memory."""
        return sum(segment.bytes for segment in self._segments)

    @property
    def outputs(self) -> int:
        """Number of outputs of the last segment that need a gradient. Recomputes the segment if it was dropped."""
        return len(self._ready(self._segments[-1]).outputs)

    @property
    def _alone(self) -> bool:
        """Whether no other forward of the stage ran since this one."""
        return self._audit.forwards == self._forwards

    def prepare(self) -> bool:
        """Recompute the last segment before its gradient arrives; return False if there is nothing to recompute."""
        if not self._segments or self._segments[-1].saved is not None:
            return False
        self._ready(self._segments[-1])
        return True

    def backward(self, grads: Gradients) -> Gradients:
        """Run the full backward: accumulate into ``.grad`` and return the input gradients."""
        while self._segments:
            saved = self._ready(self._segments[-1])
            with self._audit.backward("whole", alone=self._alone):
                grads = autograd.backward(saved, grads)
            self._segments.pop()
        return grads

    def backward_input(self, grads: Gradients) -> tuple[Gradients, list[WeightBackward], int]:
        """Run the first half of the backward.

        Returns the input gradients, the deferred weight gradients, and the bytes that these hold at most.
        """
        deferred = []
        for segment in reversed(self._segments):
            saved = self._ready(segment)
            with self._audit.backward("input", alone=self._alone):
                grads, weight_backward = backward_input(saved, grads)
            deferred.append(weight_backward)
            segment.saved = None
        return grads, deferred, self.bytes

    def _ready(self, segment: Segment) -> autograd.Saved:
        if segment.saved is None:
            self._replay(segment)
        assert segment.saved is not None
        return segment.saved


class _Parts(NamedTuple):
    """The modules of a segment's layers, and their buffers."""

    modules: list[nn.Module]
    buffers: ForwardBuffers


class SegmentRunner:
    """Runs a stage's segments and counts the bytes that they keep.

    The graph of a segment is read on the first micro-batch of every shape: its bytes are reused for later ones, and
    ``audit`` looks for what a stage cannot compute as one process would. ``leaves`` returns the stage's parameters as
    its graphs have them. ``replayed`` is called after every recomputation.
    """

    def __init__(
        self,
        module: nn.Sequential,
        recompute: Recompute,
        replayed: Callable[[], None],
        audit: Audit,
        leaves: Callable[[], Collection[torch.Tensor]],
    ) -> None:
        self.recomputed = 0
        self._replayed = replayed
        self._module = module
        self._recompute = recompute
        self._audit, self._leaves = audit, leaves
        self._bytes: dict[Any, int] = {}
        self._mutates: dict[int, bool] = {}
        self._parts: dict[tuple[int, int], _Parts] = {}

    def run(self, chunk: int, received: autograd.StageInput, forward: Forward) -> tuple[MicroBatchGraph, Nest]:
        """Run the forward of ``chunk``; return its graph, and the outputs with their autograd graph if that is kept."""
        segments: list[Segment] = []
        learning = self._recompute.learns
        costs: list[tuple[int, float]] = []
        outputs: Nest = None
        with self._audit.forward():
            for run in self._recompute.runs(chunk):
                if segments:
                    received = autograd.leave(outputs)
                segment = Segment(run, forward)
                start = time.perf_counter()
                with autograd.aliases_kept(received):
                    outputs = self._drop(segment, received) if run.drop else self._keep(segment, received)
                costs.append((segment.bytes, time.perf_counter() - start))
                segments.append(segment)
        if learning:
            self._recompute.learn(costs)
        return MicroBatchGraph(segments, self._again, self._audit), outputs

    def _keep(self, segment: Segment, received: autograd.StageInput) -> Nest:
        """Run a segment, keep its graph, and return its outputs."""
        buffers = self._parts_of(segment).buffers
        seen = buffers.before()
        outputs = self._forward(segment, received)
        buffers.after(seen, dropped=False)
        return outputs

    def _forward(self, segment: Segment, received: autograd.StageInput) -> Nest:
        nest, entry = autograd.enter(received)
        outputs = segment.forward(segment.run.start, segment.run.stop, nest, entry, False)
        autograd.check_hooks(received, entry)
        segment.saved = autograd.Saved.of(outputs, entry)
        key = (segment.run, tuple((leaf.shape, leaf.dtype) for leaf in tensors(received.nest)))
        if key not in self._bytes:
            self._audit.graph(segment.saved, self._leaves())
            known = Memory([*self._module.parameters(), *self._module.buffers()])
            self._bytes[key] = saved_by_graph(tensors(outputs)).without(known)
        segment.bytes = self._bytes[key]
        return outputs

    def _drop(self, segment: Segment, received: autograd.StageInput) -> Nest:
        """Run a segment, keep only what its recomputation starts from, and return its outputs."""
        start, stop, _ = segment.run
        # Containers of its own: a layer may add to a dict, or take from it.
        original = replace(received, nest=map_tensors(lambda leaf: leaf, received.nest))
        if self._mutates.get(start) is not False:
            original = autograd.copied(original)
        inputs, random = tensors(received.nest), rng.python_state()
        versions = [leaf._version for leaf in inputs]
        parts = self._parts_of(segment)
        attributes, seen = Attributes(parts.modules), parts.buffers.before()
        nest, entry = autograd.enter(received)
        outputs = segment.forward(start, stop, nest, entry, True)
        autograd.check_hooks(received, entry)
        buffers = parts.buffers.after(seen, dropped=True)
        attributes.check("which a recomputation would do once more", "pass checkpoint='never'")
        mutated = [leaf._version for leaf in inputs] != versions
        if mutated and self._mutates.get(start) is False:
            raise ModelError(
                f"layer {start} of the stage changed its input in place for this micro-batch and not for others;"
                " it cannot be recomputed: pass checkpoint='never' or a function that spares this stage"
            )
        self._mutates[start] = mutated or self._mutates.get(start, False)
        segment.dropped = Dropped(original, buffers, attributes, random)
        segment.bytes = Memory(tensors(original.nest)).without()
        return outputs

    def _parts_of(self, segment: Segment) -> _Parts:
        start, stop, _ = segment.run
        if (start, stop) not in self._parts:
            modules = [part for layer in list(self._module)[start:stop] for part in layer.modules()]
            self._parts[start, stop] = _Parts(modules, ForwardBuffers(modules))
        return self._parts[start, stop]

    def _again(self, segment: Segment) -> None:
        """Recompute a segment as its forward ran, and leave buffers and generators as they are now."""
        assert segment.dropped is not None
        start, stop, _ = segment.run
        self.recomputed += stop - start
        dropped, segment.dropped = segment.dropped, None
        random = rng.python_state()
        rng.set_python_state(dropped.random)
        buffers = self._parts_of(segment).buffers
        with torch.enable_grad(), buffers.as_of(dropped.buffers), dropped.attributes.restored():
            self._forward(segment, dropped.received)
        rng.set_python_state(random)
        self._replayed()
