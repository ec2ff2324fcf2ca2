"""What a pipeline must equal, in one process: three loops that a reader can check line by line.

``Oracle`` is a plain loop over the micro-batches. ``Natural`` is the loop that a user writes with torch's own autocast,
GradScaler, accumulation and clipping. ``Versioned`` is asynchronous training: a serial program that keeps every version
of the weights. It applies the definitions as the papers write them, k from 1, and knows nothing of schedules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

import rpcpipe as rp
from rpcpipe.model import rng
from rpcpipe.model.microbatch import split
from rpcpipe.model.wiring import Wiring
from support.models import batches


class Oracle:
    """The contract's right-hand side: a plain loop over the micro-batches in one process.

    With ``replicas`` each share's gradients are summed by themselves before they are added up, which makes the
    bits a 2D pipeline's; ``plain`` sums all micro-batches' in one row.
    """

    def __init__(
        self,
        model: nn.Sequential,
        optimizer: Any,
        loss: Any,
        chunks: int,
        *,
        seed: int = 0,
        clip: float | None = None,
        replicas: int = 1,
        plain: bool = False,
    ) -> None:
        self.model, self.loss, self.chunks, self.seed, self.clip = model, loss, chunks, seed, clip
        self.replicas, self.plain = replicas, plain
        self.optimizer = optimizer(list(model.parameters()))
        self.step = 0
        self.grad_norm = 0.0

    def train_step(self, inputs: Any, targets: torch.Tensor) -> float:
        total, count, chunk = 0.0, None, 0
        sums: list[torch.Tensor] = []
        for share in zip(split(inputs, self.replicas), targets.chunk(self.replicas), strict=True):
            for x, y in zip(*(split(batch, self.chunks) for batch in share), strict=True):
                value = self.loss(self.forward(x, chunk), y)
                chunk += 1
                if isinstance(value, tuple):
                    value, n = value
                    count = (count or 0.0) + float(n)
                    value.backward()
                    total += value.item()
                else:
                    weight = len(y) / len(targets)
                    (value * weight).backward()
                    total += value.item() * weight
            if not self.plain:
                sums = self._added(sums)
        for parameter, grad in zip(self.model.parameters(), sums, strict=not self.plain):
            parameter.grad = grad
        if count is not None:
            total /= count
            for parameter in self.model.parameters():
                parameter.grad.div_(count)  # type: ignore[union-attr]
        grads: list[Any] = [p.grad for p in self.model.parameters() if p.requires_grad]
        self.grad_norm = float(nn.utils.get_total_norm(grads))
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return total

    def _added(self, sums: list[torch.Tensor]) -> list[torch.Tensor]:
        found: list[Any] = [parameter.grad for parameter in self.model.parameters()]
        self.optimizer.zero_grad()
        return [a + b for a, b in zip(sums, found, strict=True)] if sums else found

    def forward(self, x: Any, chunk: int) -> Any:
        def call(index: int, layer: nn.Module, *arguments: Any) -> Any:
            rng.seed_layer(self.seed, self.step, chunk, index)
            return layer(*arguments)

        return chained(self.model, x, call)


def chained(model: nn.Sequential, x: Any, call: Callable[..., Any]) -> Any:
    """``model``'s layers one after the other, each by ``call(index, layer, x, *taken)``."""
    wirings = model.wirings if isinstance(model, rp.layers.Sequential) else {}
    values = dict(x) if isinstance(x, dict) else {}
    for index, (name, layer) in enumerate(model.named_children()):
        wiring = wirings.get(name, Wiring())
        x = call(index, layer, x, *(values[taken] for taken in wiring.takes))
        if wiring.gives:
            x, *given = x
            values.update(zip(wiring.gives, given, strict=True))
    return x


def assert_same_weights(pipe: rp.Pipeline, model: nn.Module) -> None:
    state = pipe.state_dict()
    assert list(state) == list(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), f"{name} differs by {(state[name] - value).abs().max()}"


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


DEFINITIONS = {
    "stash": lambda k, r, stages, m: max(0, k - (stages - 1 - r) - 1),
    "vertical_sync": lambda k, r, stages, m: max(0, k - stages),
    "2bw": lambda k, r, stages, m: max((k - 1) // m - 1, 0),
}


class Versioned:
    """``model`` cut into stages of ``balance`` layers; ``step`` is one update on given micro-batches."""

    def __init__(
        self, model: nn.Sequential, optimizer: Any, loss: Any, balance: Sequence[int], *, seed: int = 0,
        clip: float | None = None,
    ) -> None:  # fmt: skip
        self.model, self.loss, self.seed, self.clip = model, loss, seed, clip
        self.optimizer = optimizer(list(model.parameters()))
        self.stage_of = [stage for stage, size in enumerate(balance) for _ in range(size)]
        self.updates = 0
        self.versions = [self._copy()]

    def _copy(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def step(self, parts: Iterable[tuple[Any, Any, float]], used: Sequence[int]) -> list[float]:
        """``parts``: (inputs, targets, weight); ``used``: each stage's version, from 0 at the last flush."""
        leaves = {
            name: self.versions[used[self._stage(name)]][name].clone().requires_grad_() for name in self.versions[0]
        }
        losses = []
        for position, (x, y, weight) in enumerate(parts):

            def call(index: int, layer: nn.Module, *arguments: Any, position: int = position) -> Any:
                rng.seed_layer(self.seed, self.updates, position, index)
                prefix = f"{index}."
                own = {name.removeprefix(prefix): leaf for name, leaf in leaves.items() if name.startswith(prefix)}
                return functional_call(layer, own, arguments)

            value = self.loss(chained(self.model, x, call), y)
            value = value[0] / value[1] if isinstance(value, tuple) else value
            losses.append(value.item())
            (value * weight).backward()
        for name, parameter in self.model.named_parameters():
            parameter.grad = leaves[name].grad
        if self.clip is not None:
            for stage in sorted(set(self.stage_of)):
                own_stage = [p for name, p in self.model.named_parameters() if self._stage(name) == stage]
                nn.utils.clip_grad_norm_(own_stage, self.clip)
        self.optimizer.step()
        self.updates += 1
        self.versions.append(self._copy())
        return losses

    def skip(self) -> None:
        """A minibatch that changes nothing: a version all the same."""
        self.updates += 1
        self.versions.append(self._copy())

    def flush(self) -> None:
        """Versions count from here."""
        self.versions = [self._copy()]

    def _stage(self, name: str) -> int:
        return self.stage_of[int(name.partition(".")[0])]


def train(
    oracle: Versioned, batches: Iterable[tuple[Any, torch.Tensor]], policy: str, stages: int, chunks: int,
    flush_every: int | None = None,
) -> list[float]:  # fmt: skip
    """The losses of ``batches`` under ``policy``, each cut into ``chunks`` micro-batches."""
    losses, k = [], 0
    for number, (inputs, targets) in enumerate(batches, 1):
        parts = list(zip(split(inputs, chunks), targets.chunk(chunks), strict=True))
        shares = [len(y) / len(targets) for _, y in parts]
        if policy == "2bw":
            used = [DEFINITIONS[policy](k + 1, r, stages, chunks) for r in range(stages)]
            found = oracle.step([(x, y, s) for (x, y), s in zip(parts, shares, strict=True)], used)
            k += len(parts)
        else:
            found = []
            for x, y in parts:
                k += 1
                found += oracle.step([(x, y, 1.0)], [DEFINITIONS[policy](k, r, stages, chunks) for r in range(stages)])
        losses.append(sum(value * share for value, share in zip(found, shares, strict=True)))
        if flush_every is not None and number % flush_every == 0:
            oracle.flush()
            k = 0
    return losses
