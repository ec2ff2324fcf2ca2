"""One micro-batch's way through a stage: a chain of pieces, each kept or run again in the backward."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rpcpipe.model.microbatch import Nest, tensors
from rpcpipe.stage import autograd
from rpcpipe.stage.activation_memory import Memory, Meter, forgetting
from rpcpipe.stage.autograd import Gradients
from rpcpipe.stage.recompute import Recompute, Run
from rpcpipe.stage.split_backward import Deferred, backward_input

# (first layer, one past the last, nest, where it entered) -> outputs
Forward = Callable[[int, int, Nest, autograd.Entered], Nest]


@dataclass
class Piece:
    """A run of layers for one micro-batch: ``saved``, or the ``received`` from which to run it again."""

    run: Run
    forward: Forward
    saved: autograd.Saved | None = None
    received: autograd.Received | None = None
    bytes: int = 0


class Chain:
    """What a stage keeps of one micro-batch between its forward and its backward."""

    def __init__(self, pieces: list[Piece], replay: Callable[[Piece], None]) -> None:
        self._pieces = pieces
        self._replay = replay

    @property
    def bytes(self) -> int:
        """Activations alive now."""
        return sum(piece.bytes for piece in self._pieces)

    @property
    def outputs(self) -> list[torch.Tensor]:
        """The last piece's, which need a gradient. Runs it again if it was dropped."""
        return self._ready(self._pieces[-1]).outputs

    def prepare(self) -> bool:
        """Run the last piece again, ahead of its gradient; False if there is nothing to do."""
        if not self._pieces or self._pieces[-1].saved is not None:
            return False
        self._ready(self._pieces[-1])
        return True

    def backward(self, grads: Gradients) -> Gradients:
        """Parameters' ``.grad`` grow; the inputs' gradients."""
        while self._pieces:
            grads = autograd.backward(self._ready(self._pieces[-1]), grads)
            self._pieces.pop()
        return grads

    def backward_input(self, grads: Gradients) -> tuple[Gradients, list[Deferred], int]:
        """The inputs' gradients, what is left to do for the weights, and how many bytes that may hold."""
        deferred = []
        for piece in reversed(self._pieces):
            grads, rest = backward_input(self._ready(piece), grads)
            deferred.append(rest)
            piece.saved = None
        return grads, deferred, self.bytes

    def _ready(self, piece: Piece) -> autograd.Saved:
        if piece.saved is None:
            self._replay(piece)
        assert piece.saved is not None
        return piece.saved


class Keeper:
    """Runs chains for a stage and counts what they keep.

    The bytes of a piece are measured on the first micro-batch of every shape and hold for the
    others: hooks on every saved tensor of every micro-batch would cost a per cent.
    """

    def __init__(self, module: nn.Module, recompute: Recompute, replayed: Callable[[], None]) -> None:
        self.recomputed = 0
        self._replayed = replayed
        self._module = module
        self._recompute = recompute
        self._bytes: dict[Any, int] = {}
        self._mutates: dict[int, bool] = {}

    def run(self, chunk: int, received: autograd.Received, forward: Forward) -> tuple[Chain, Nest]:
        """(what is kept, the outputs with their graph if that is kept)."""
        pieces: list[Piece] = []
        learning = self._recompute.learns
        costs: list[tuple[int, float]] = []
        outputs: Nest = None
        for run in self._recompute.runs(chunk):
            if pieces:
                received = autograd.leave(outputs)
            piece = Piece(run, forward)
            start = time.perf_counter()
            outputs = self._drop(piece, received) if run.drop else self._keep(piece, received)
            costs.append((piece.bytes, time.perf_counter() - start))
            pieces.append(piece)
        if learning:
            self._recompute.learn(costs)
        return Chain(pieces, self._again), outputs

    def _keep(self, piece: Piece, received: autograd.Received) -> Nest:
        """Run a piece and keep its graph."""
        key = (piece.run, tuple((leaf.shape, leaf.dtype) for leaf in tensors(received.nest)))
        if key in self._bytes:
            outputs = self._forward(piece, received)
        else:
            with Meter(self._known()) as meter:
                outputs = self._forward(piece, received)
            self._bytes[key] = meter.bytes
        piece.bytes = self._bytes[key]
        return outputs

    def _known(self) -> list[torch.Tensor]:
        return [*self._module.parameters(), *self._module.buffers()]

    def _forward(self, piece: Piece, received: autograd.Received) -> Nest:
        nest, entered = autograd.enter(received)
        outputs = piece.forward(piece.run.start, piece.run.stop, nest, entered)
        piece.saved = autograd.Saved(autograd.differentiable(outputs), entered)
        return outputs

    def _drop(self, piece: Piece, received: autograd.Received) -> Nest:
        """Run a piece and keep its input alone, as it was before a layer changed it in place."""
        start, given = piece.run.start, tensors(received.nest)
        kept = received if self._mutates.get(start) is False else autograd.copied(received)
        before = [leaf._version for leaf in given]
        with forgetting():
            outputs = self._forward(piece, received)
        piece.saved = None
        mutated = [leaf._version for leaf in given] != before
        if mutated and self._mutates.get(start) is False:
            raise RuntimeError(
                f"layer {start} of the stage changed its input in place for this micro-batch and not for others;"
                " it cannot be recomputed: pass checkpoint='never' or a function that spares this stage"
            )
        self._mutates[start] = mutated or self._mutates.get(start, False)
        piece.received = kept if mutated else received
        piece.bytes = Memory(tensors(piece.received.nest)).without()
        # The graph, empty as it is, would keep intermediate results alive.
        return outputs

    def _again(self, piece: Piece) -> None:
        """Recompute; buffers (BatchNorm's statistics) have seen this micro-batch already."""
        assert piece.received is not None
        self.recomputed += piece.run.stop - piece.run.start
        received, piece.received = piece.received, None
        buffers = [(buffer, buffer.clone()) for buffer in self._module.buffers()]
        with torch.enable_grad():
            self._keep(piece, received)
        for buffer, value in buffers:
            buffer.data.copy_(value)
        self._replayed()
