"""The oracle of asynchronous training: a serial program that keeps every version of the weights.

It applies the definitions as the papers write them, k from 1, and knows nothing of schedules.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from rpcpipe.model import rng
from rpcpipe.model.microbatch import split
from support.helpers import chained

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
