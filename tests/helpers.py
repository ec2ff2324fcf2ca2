"""What several test modules share: models, the single-process oracle, and a cluster without processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.model import rng
from rpcpipe.model.microbatch import split
from rpcpipe.model.wiring import Wire
from rpcpipe.transport.local import LocalTransport
from rpcpipe.worker.executor import Executor


def mlp(layers: int = 8, width: int = 12, dropout: float = 0.1) -> nn.Sequential:
    torch.manual_seed(1)
    parts: list[nn.Module] = []
    for _ in range(layers - 1):
        parts.append(nn.Sequential(nn.Linear(width, width), nn.Dropout(dropout), nn.GELU()))
    return nn.Sequential(*parts, nn.Linear(width, 4))


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


OPTIMIZERS = {"sgd": sgd, "adamw": adamw}


def cross_entropy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output, target)


def summed(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ignores target 0, as masked language modelling ignores positions."""
    kept = target != 0
    return nn.functional.cross_entropy(output[kept], target[kept], reduction="sum"), kept.sum()


def batches(count: int, size: int = 10, width: int = 12) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        yield torch.randn(size, width, generator=generator), torch.randint(0, 4, (size,), generator=generator)


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
    wires = model.wires if isinstance(model, rp.Sequential) else {}
    values = dict(x) if isinstance(x, dict) else {}
    for index, (name, layer) in enumerate(model.named_children()):
        wire = wires.get(name, Wire())
        x = call(index, layer, x, *(values[taken] for taken in wire.takes))
        if wire.gives:
            x, *given = x
            values.update(zip(wire.gives, given, strict=True))
    return x


def assert_same_weights(pipe: rp.Pipeline, model: nn.Module) -> None:
    state = pipe.state_dict()
    assert list(state) == list(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), f"{name} differs by {(state[name] - value).abs().max()}"


class LocalCluster:
    """Workers in this process over the shuffling transport; enough of a Cluster for a Pipeline."""

    def __init__(
        self, workers: int, seed: int = 0, *, timeout: float = 5.0, drop: Callable[[str, str], bool] | None = None
    ) -> None:
        self.transport = LocalTransport(seed, drop=drop)
        self.workers = [SimpleNamespace(name=f"worker{index}", host="elsewhere") for index in range(workers)]
        self.timeout = timeout
        self.healthy = True
        self.pipelines: set[Any] = set()
        for worker in self.workers:
            executor = Executor(worker.name, self.transport, device=torch.device("cpu"), threads=1)
            self.transport.serve(worker.name, executor)

    def relabel(self) -> None:
        pass

    def check(self) -> None:
        pass
