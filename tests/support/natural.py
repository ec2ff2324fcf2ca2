"""The loop that a user writes in one process: autocast, GradScaler, accumulation, clipping, all of torch's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

import rpcpipe as rp
from support.helpers import Oracle, assert_same_weights, batches


class Natural(Oracle):
    """``train_step`` returns the loss; ``updated`` says whether the call ended in an update of the weights."""

    def __init__(
        self, model: nn.Sequential, optimizer: Any, loss: Any, chunks: int, *, clip: float | None = None,
        autocast: torch.dtype | None = None, scaler: torch.amp.GradScaler | None = None, accumulate: int = 1,
    ) -> None:  # fmt: skip
        super().__init__(model, optimizer, loss, chunks, clip=clip)
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = optimizer(self.trainable)
        self.autocast, self.accumulate = autocast, accumulate
        self.scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
        self.count: float | None = None
        self.updated = False
        self.calls = 0

    def context(self) -> AbstractContextManager[None]:
        return nullcontext() if self.autocast is None else torch.autocast("cpu", self.autocast)

    def train_step(self, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        total, count = 0.0, None
        for chunk, (x, y) in enumerate(zip(inputs.chunk(self.chunks), targets.chunk(self.chunks), strict=True)):
            with self.context():
                value = self.loss(self.forward(x, chunk), y)
            if isinstance(value, tuple):
                value, n = value
                count = (count or 0.0) + float(n)
                total += value.item()
            else:
                weight = len(x) / len(inputs)
                total += value.item() * weight
                value = value * (weight / self.accumulate)
            self.scaler.scale(value).backward()
        self.step, self.calls = self.step + 1, self.calls + 1
        if count is not None:
            self.count = (self.count or 0.0) + count
        self.updated = self.calls % self.accumulate == 0 and self._update()
        return total if count is None else total / count

    def _update(self) -> bool:
        self.scaler.unscale_(self.optimizer)
        grads = [p.grad for p in self.trainable if p.grad is not None]
        if self.count is not None:
            for grad in grads:
                grad.div_(self.count)
        self.grad_norm = float(nn.utils.get_total_norm(grads))
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.trainable, self.clip)
        before = [parameter.detach().clone() for parameter in self.trainable]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.count = None
        return any(not torch.equal(old, new) for old, new in zip(before, self.trainable, strict=True))


def assert_same_run(pipe: rp.Pipeline, loop: Natural, data: Iterator[Any] | None = None) -> list[rp.StepResult]:
    """Losses, norms, what was applied, and at the end the weights: the same bits."""
    results = []
    for inputs, targets in data or batches(4):
        result = pipe.train_step(inputs, targets)
        assert result.loss == loop.train_step(inputs, targets)
        assert result.applied == loop.updated
        if result.applied:
            assert result.grad_norm == loop.grad_norm
        results.append(result)
    assert_same_weights(pipe, loop.model)
    return results
