"""A training run whose workers are killed in it, for ./benchmarks/run kills: its model, and what it does act by act.

The same acts without kills give the values and the weights that must be equal.
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rpcpipe as rp
from support.models import batches, cross_entropy

HOW = ("SIGKILL", "SIGSTOP", "exit")
LAYERS, CHUNKS = 8, 4
_DATA = 16


@contextmanager
def ground() -> Iterator[Path]:
    """Yield a new folder for a run; deaths are no news to the log."""
    torch.set_num_threads(1)
    logging.getLogger("rpcpipe").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "armed").mkdir()
        yield Path(name)


def alike(weights: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether two models' weights have the same names, in order, and bits."""
    return list(weights) == list(expected) and all(torch.equal(weights[name], expected[name]) for name in expected)


def arm(folder: Path, phase: str, how: str, skip: int = 0) -> None:
    """Let the worker that comes to ``phase`` die there, after ``skip`` times that one has come by."""
    (folder / "arming").write_text(f"{how} {skip}")
    (folder / "arming").rename(folder / phase)


def disarm(folder: Path) -> float | None:
    """Return when a worker has died as armed, on the monotonic clock; None if none has."""
    struck = [float(file.read_text()) for file in folder.glob("struck.*")]
    for file in folder.iterdir():
        file.unlink(missing_ok=True)
    return struck[0] if struck else None


def die_if_armed(folder: Path, phase: str) -> None:
    """Die if ``phase`` is armed: of all that come by, the one that takes the file."""
    own = folder / f"{phase}.{os.getpid()}"
    try:
        (folder / phase).rename(own)
    except FileNotFoundError:
        return
    how, skip = own.read_text().split()
    if int(skip):
        own.write_text(f"{how} {int(skip) - 1}")
        own.rename(folder / phase)
        return
    (folder / f"struck.{os.getpid()}").write_text(str(time.monotonic()))
    if how == "exit":
        os._exit(3)
    os.kill(os.getpid(), getattr(signal, how))


class _Gate(torch.autograd.Function):
    """The identity, whose backward may be fatal."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, folder: Path, phase: str) -> torch.Tensor:
        ctx.where = folder, phase
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        die_if_armed(*ctx.where)
        return *gradients, None, None


class MortalLayer(nn.Module):
    """A layer with dropout and, in one layer of two, running statistics, in which its worker may die."""

    def __init__(self, folder: Path, number: int, width: int) -> None:
        super().__init__()
        self.folder, self.number = folder, number
        self.linear = nn.Linear(width, 4 if number == LAYERS - 1 else width)
        self.norm = nn.BatchNorm1d(width) if number % 2 == 0 else nn.Identity()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(self.dropout(torch.tanh(self.norm(x))))
        die_if_armed(self.folder, f"forward{self.number}")
        return _Gate.apply(x, self.folder, f"backward{self.number}") if x.requires_grad else x  # type: ignore[no-untyped-call]


class MortalAdamW(torch.optim.AdamW):
    """AdamW in whose step its worker may die, once half of the parameters are updated."""

    folder: Path

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        owned = [parameter for group in self.param_groups for parameter in group["params"]]
        if (self.folder / "update").exists() and len(owned) > 1:
            kept = {parameter: parameter.grad for parameter in owned[len(owned) // 2 :]}
            for parameter in kept:
                parameter.grad = None
            super().step()
            die_if_armed(self.folder, "update")
            for parameter, gradient in kept.items():
                parameter.grad = gradient
            for parameter in owned[: len(owned) // 2]:
                parameter.grad = None
        super().step()


class Optimizers:
    """Makes the optimizers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = MortalAdamW(params, lr=1e-3)
        optimizer.folder = self.folder
        return optimizer


class Halve:
    """A call that changes all values of a stage a little, in which its worker may die in the middle."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, module: nn.Module) -> float:
        with torch.no_grad():
            for number, parameter in enumerate(module.parameters()):
                parameter.mul_(0.999)
                if number == 1:
                    die_if_armed(self.folder, "call")
            return float(sum(parameter.double().sum() for parameter in module.parameters()))


class Run:
    """A pipeline and what it does: ``act`` returns the values that must be as without kills.

    ``told`` is called with the result of every training step.
    """

    def __init__(
        self, cluster: rp.Cluster, folder: Path, told: Callable[[rp.StepResult], None], **options: Any
    ) -> None:
        self.folder, self.told = folder, told
        self.width: int = options.pop("width", 192)
        torch.manual_seed(1)
        model = nn.Sequential(*[MortalLayer(folder / "armed", number, self.width) for number in range(LAYERS)])
        self.data = list(batches(_DATA, size=32, width=self.width))
        self.pipe = rp.Pipeline(
            model, cluster, loss=cross_entropy, optimizer=Optimizers(folder / "armed"), chunks=CHUNKS, **options
        )
        self.pipe.on_step(told)
        self.steps = 0

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next batch to train on."""
        self.steps += 1
        return self.data[(self.steps - 1) % _DATA]

    def act(self, name: str) -> list[float]:
        """Do what ``name`` says."""
        found: list[float] = getattr(self, name)()
        return found

    def train(self) -> list[float]:
        return [self.pipe.train_step(*self.batch()).loss]

    def ahead(self) -> list[float]:
        return [result.loss for result in self.pipe.train([self.batch() for _ in range(4)], ahead=1)]

    def idle(self) -> list[float]:
        """Nothing: between two steps."""
        return []

    def evaluate(self) -> list[float]:
        return [self.pipe.evaluate(self.data[:4])]

    def predict(self) -> list[float]:
        return [float(output.double().sum()) for output in self.pipe.predict(inputs for inputs, _ in self.data[:4])]

    def save(self) -> list[float]:
        """Save, and go on from what was saved."""
        self.pipe.save(self.folder / "saved", position=self.steps)
        return [float(self.pipe.load(self.folder / "saved"))]

    def state_dict(self) -> list[float]:
        return [float(value.double().sum()) for value in self.pipe.state_dict().values()]

    def call(self) -> list[float]:
        stage = self.pipe.stages[self.steps % len(self.pipe.stages)]
        return [stage.call(Halve(self.folder / "armed"))]
